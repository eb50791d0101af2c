"""The stage that takes a spread student apart: an ONNX file for each board, the fusing head, and what silence costs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import ExportError
from edgekd.stages.exporting import OTHER_GRAPH, export_settings, reference
from edgekd.stages.job import LABELS, LOGITS, Array, Inputs, Job, test_logits

HEAD, FEATURES = "head.onnx", "test_features.npy"
# Of the ways in which a number of boards can be silent, so many are tried.
SUBSETS = 64


def part_file(board: int) -> str:
    """The name of the ONNX file for a board."""
    return f"part_{board}.onnx"


def parts(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Export every board's part and the head; measure the whole for every number of silent boards, in ONNX Runtime."""
    from edgekd import export, networks

    network, dataset = job.restore("student", inputs["student"]), job.dataset
    assert isinstance(network, networks.Spread)
    settings, boards = export_settings(job, "student", inputs["student"]), len(network.parts)
    answers, files = [], []
    for board, part in enumerate(network.parts):
        job.on_progress(board / (boards + 1), f"exporting the part of board {board}")
        file, about = out / part_file(board), settings["metadata"] | {"edgekd.board": f"{board} of {boards}"}
        names = ("images", "features")
        made = export.export(part, file, example=job.images(0, 1), **settings | {"metadata": about}, names=names)
        answers.append(test_logits(job, reference(file, work, threads=1)))
        files.append(
            {
                "file": file.name,
                "size_bytes": made["size_bytes"],
                "params": networks.count_params(part),
                "macs": networks.count_macs(part, dataset.shape),
            }
        )
    features = np.stack(answers, 1)
    names = ("features", "logits")
    export.export(network.head, out / HEAD, example=features[:1], **settings, names=names)
    head = reference(out / HEAD, work, threads=1)
    _check(features, head, np.load(inputs["student"].file(LOGITS)), job.recipe.export.tolerance)
    job.on_progress(boards / (boards + 1), "measuring with silent boards")
    np.save(out / FEATURES, features)
    np.save(out / LABELS, dataset.test.labels)
    return {
        "boards": boards,
        "copies": network.copies,
        "message_bytes": int(features[0, 0].nbytes),
        "parts": files,
        "head": {"file": HEAD, "size_bytes": (out / HEAD).stat().st_size},
        "silent": silences(features, head, dataset.judge("test").score),
    }


def silences(
    features: Array, head: Callable[[Array], Array], score: Callable[[Array], float], lost: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """The score for every number of silent boards but all of them: mean, lowest and highest over who is silent.

    features: [N, boards, F], what the boards answered; lost: who gave zeros, and is among the silent in every row.
    """
    rows, answering = [], [board for board in range(features.shape[1]) if board not in lost]
    for number in range(len(answering)):
        found = []
        for silent in subsets(len(answering), number):
            heard = features.copy()
            heard[:, [answering[place] for place in silent]] = 0
            found.append(score(head(heard)))
        rows.append(
            {
                "silent": len(lost) + number,
                "tried": len(found),
                "ways": math.comb(len(answering), number),
                "score": float(np.mean(found)),
                "lowest_score": min(found),
                "highest_score": max(found),
            }
        )
    return rows


def subsets(boards: int, number: int) -> Iterator[list[int]]:
    """Which boards are silent: all ways, or of very many ways some that are always the same."""
    if math.comb(boards, number) <= SUBSETS:
        yield from map(list, combinations(range(boards), number))
        return
    drawn = random.Random(boards * 1000 + number)
    for _ in range(SUBSETS):
        yield sorted(drawn.sample(range(boards), number))


def _check(features: Array, head: Callable[[Array], Array], expected: Array, tolerance: float) -> None:
    """Raise ExportError unless parts and head together are the network that was trained."""
    difference = np.abs(head(features) - expected).max(1) / np.abs(expected).max(1)
    other = float((difference > tolerance).mean())
    if other > OTHER_GRAPH:
        raise ExportError(
            f"parts and head do not compute what the student does: other logits for {other:.1%} of the test images",
            allowed=f"expected: at most {OTHER_GRAPH:.0%} differ by more than {tolerance:g} of the largest logit",
            fix="report this network",
        )
