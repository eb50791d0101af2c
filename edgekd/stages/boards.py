"""The stage that runs a spread student on its boards, and fuses here what those answered."""

from __future__ import annotations

import logging
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.backends import Engine
from edgekd.bench import measure_alone
from edgekd.compiling import ENGINE, size_of
from edgekd.errors import BoardFailed, MissingError, StageError
from edgekd.stages.deploying import benchmark_options, compiled
from edgekd.stages.exporting import reference
from edgekd.stages.job import LABELS, Inputs, Job
from edgekd.stages.spreading import FEATURES, HEAD, part_file, silences

_log = logging.getLogger(__name__)


def boards(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Compile every part for its board and run it there; a board that fails or is lost is silent, and no error.

    One board after the other: those that are one machine must not disturb each other's times.
    Raises BoardFailed when none answers.
    """
    parts, judge = inputs["parts"], job.dataset.judge("test", job.recipe.benchmark.accuracy_samples)
    engines = [_engine(job, number, parts.file(part_file(number)), work) for number in range(len(job.boards))]
    samples = job.images(0, len(judge.labels))
    features = np.load(parts.file(FEATURES), mmap_mode="r").shape[2]
    heard = np.zeros((len(samples), len(engines), features), np.float32)
    rows: list[dict[str, Any]] = []
    for number, ((name, board), engine) in enumerate(zip(job.boards.items(), engines, strict=True)):
        try:
            # What is interrupted is lost: the other boards would wait for it.
            alone, heard[:, number] = measure_alone(
                engine, samples=samples, answer=(features,), device=board.open_device(),
                workdir=work / "session" / name, mode=job.mode(), **benchmark_options(job), attempts=1,
                on_progress=partial(_tell, job, name, number),
            )  # fmt: skip
            found = {"status": alone["status"], "reasons": alone["reasons"]}
            found |= {key: alone["latency"][engine.name][key] for key in ("p50_ms", "p99_ms")}
        except (StageError, MissingError) as error:
            _log.warning("%s is silent: %s", name, error.what)
            found = {"status": "SILENT", "reasons": [error.what], "p50_ms": None, "p99_ms": None}
        about = {"name": name, "url": board.device, "target": board.target.name, "backend": engine.backend}
        rows.append(about | {"size_bytes": size_of(engine.folder)} | found)
    lost = [number for number, row in enumerate(rows) if row["status"] == "SILENT"]
    if len(lost) == len(rows):
        raise BoardFailed(
            f"no board answered; {rows[0]['name']}: {rows[0]['reasons'][0]}",
            allowed=f"{len(rows)} boards are silent, and the head has nothing to fuse",
            fix=f"edgekd doctor --device {shlex.quote(rows[0]['url'])}",
        )
    np.save(out / FEATURES, heard)
    np.save(out / LABELS, judge.labels)
    head = reference(parts.file(HEAD), work, threads=1)
    return {"boards": rows, "n": len(samples), "silent": silences(heard, head, judge.score, lost)}


def _engine(job: Job, number: int, model: Path, work: Path) -> Engine:
    name, board = list(job.boards.items())[number]
    board.on_progress = lambda share, text: job.on_progress(0.0, f"{name}: {text}")
    folder = work / "compiled" / name
    folder.mkdir(parents=True)
    compiled(model.stem, board, model, folder, folder)
    backend = board.backend
    return Engine(model.stem, folder / ENGINE, backend.runner, backend.name, tuple(backend.libraries()))


def _tell(job: Job, name: str, number: int, share: float, left_s: float, text: str) -> None:
    del left_s
    job.on_progress((number + share) / len(job.boards), f"{name}: {text}")
