"""A student for several boards, end to end: its ONNX files, what silence costs, and the report of it."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tiny_job import SPREAD, make_job

from edgekd import pipeline
from edgekd.artifact import Artifact
from edgekd.errors import ExportError
from edgekd.stages.spreading import _check, silences, subsets

BOARDS, FILTERS = 3, 24
LMA = ("student.activation=lma", "distill.train={epochs: 4, batch_size: 32, lr: 0.05}")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Artifact]:
    return pipeline.run(make_job(tmp_path_factory.mktemp("spread"), *LMA, recipe=SPREAD), "parts")


def run(file: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    return found


@pytest.mark.slow
def test_parts_and_head_together_are_the_student(made):
    folder = made["parts"].folder
    assert sorted(file.name for file in folder.glob("*.onnx")) == [
        "head.onnx",
        *(f"part_{n}.onnx" for n in range(BOARDS)),
    ]
    x = make_job(folder, *LMA, recipe=SPREAD).images(0, 50)
    features = np.stack([run(folder / f"part_{board}.onnx", x) for board in range(BOARDS)], 1)
    assert features.shape == (50, BOARDS, FILTERS // BOARDS * 2)
    np.testing.assert_allclose(features, np.load(folder / "test_features.npy"), rtol=1e-3, atol=1e-4)
    logits = run(folder / "head.onnx", features)
    np.testing.assert_allclose(logits, np.load(made["student"].file("test_logits.npy")), rtol=1e-2, atol=1e-2)
    assert made["parts"].result["message_bytes"] == 4 * features.shape[2]
    for board, part in enumerate(made["parts"].result["parts"]):
        assert part["file"] == f"part_{board}.onnx"
        assert part["size_bytes"] == (folder / part["file"]).stat().st_size
        assert 0 < part["macs"] < made["student"].result["macs"]


@pytest.mark.slow
def test_accuracy_for_every_number_of_silent_boards(made):
    folder = made["parts"].folder
    features, labels = (np.load(folder / name) for name in ("test_features.npy", "test_labels.npy"))
    rows = made["parts"].result["silent"]
    assert [row["silent"] for row in rows] == [0, 1, 2]
    for row in rows:
        found = []
        for silent in combinations(range(BOARDS), row["silent"]):
            heard = features.copy()
            heard[:, list(silent)] = 0
            found.append((run(folder / "head.onnx", heard).argmax(1) == labels).mean())
        assert row["tried"] == row["ways"] == len(found)
        assert (row["score"], row["lowest_score"], row["highest_score"]) == pytest.approx(
            (np.mean(found), min(found), max(found))
        )
    assert rows[0]["score"] == pytest.approx(made["student"].result["score"], abs=0.021)


def test_of_very_many_ways_some_are_drawn_and_always_the_same():
    assert list(subsets(4, 2)) == [list(one) for one in combinations(range(4), 2)]
    drawn = list(subsets(12, 6))
    assert drawn == list(subsets(12, 6))
    assert len(drawn) == 64 and all(len(set(one)) == 6 for one in drawn)
    rows = silences(np.ones((3, 12, 2), np.float32), lambda x: x, lambda x: 0.5)
    assert (rows[6]["tried"], rows[6]["ways"]) == (64, 924)


def test_parts_that_are_another_network():
    features, expected = np.ones((100, 2, 3), np.float32), np.ones((100, 2), np.float32)
    _check(features, lambda x: expected, expected, 1e-3)
    with pytest.raises(ExportError) as caught:
        _check(features, lambda x: expected + np.arange(100)[:, None] // 95, expected, 1e-3)
    assert str(caught.value) == (
        "error: parts and head do not compute what the student does: other logits for 5.0% of the test images\n"
        "       expected: at most 1% differ by more than 0.001 of the largest logit\n"
        "fix:   report this network"
    )
