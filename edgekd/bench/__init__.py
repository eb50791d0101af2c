"""Deploy engines to a device, time them against each other there and score them on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.backends import Engine
from edgekd.bench import end_to_end
from edgekd.bench.arrays import array_from, quality_from_logits, table_from_latencies, understood
from edgekd.bench.deployment import ATTEMPTS, Progress, bundle, measured_on
from edgekd.bench.end_to_end import Pictures
from edgekd.bench.latencies import rounds
from edgekd.bench.modes import Mode
from edgekd.bench.summary import latency, summarize
from edgekd.bench.validity import MIN_QUERIES, invalid_because
from edgekd.device import Device
from edgekd.errors import RecipeError, StageError
from edgekd.tasks import Judge

__all__ = ["MIN_LAUNCHES", "benchmark", "bundle", "measure_alone", "settings_of"]

MIN_LAUNCHES = 6  # fewer give no 95 % interval: see stats.median_interval
MAX_STRETCH = 6  # a slow engine may take this many times the seconds asked for to reach MIN_QUERIES
SETUP_TIMEOUT_S = 300.0  # to load the runtime and the engines of one launch on a slow board


def benchmark(
    student: Engine,
    teacher: Engine | None,
    *,
    samples: npt.NDArray[np.float32],
    judge: Judge,
    device: Device,
    workdir: Path,
    mode: Mode,
    pictures: Pictures | None = None,
    launches: int = 9,
    lock_clocks: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure `student` against `teacher` on `device`; leave raw latencies and logits in `workdir`.

    Without a teacher the student is measured alone, and what compares the two is None.

    samples: float32 [N, C, H, W] as the networks take them; judge: of the answers; pictures: time also
    the way from these to the answer; launches: 9 are the fewest whose
    interval survives one odd launch at either end; lock_clocks: hold the device's clocks at their highest meanwhile,
    which needs root there.

    Raises RecipeError for fewer than 6 launches, StageError when an engine cannot be run there. A measurement that does
    not hold is no error: its `status` is INVALID, with `reasons`.
    """
    engines = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    settings = settings_of(mode, pictures, launches=launches, lock_clocks=lock_clocks, seed=seed)
    workdir.mkdir(parents=True, exist_ok=True)
    timeout = _timeout(launches, mode, samples)
    measured = measured_on(
        device, engines, samples, settings, workdir, pictures=pictures, timeout=timeout, on_progress=on_progress
    )
    tables = {name: table_from_latencies(workdir / f"{name}_latency.npy", name) for name in engines}
    if len({len(rounds(mode.headline(table))) for table in tables.values()}) > 1:
        raise StageError(
            f'benchmark on "{device.url}": student and teacher were not timed in the same rounds',
            allowed="each round times both",
            fix="measure again: edgekd bench",
        )
    quality = {name: quality_from_logits(workdir / f"{name}_logits.npy", judge, name) for name in engines}
    with understood(device.url):
        return summarize(measured, tables, quality, mode) | {
            "end_to_end": end_to_end.findings(measured, workdir) if pictures else None,
            "settings": settings,
            "argv": measured["argv"],
            "url": device.url,
        }


def measure_alone(
    engine: Engine,
    *,
    samples: npt.NDArray[np.float32],
    answer: tuple[int, ...],
    device: Device,
    workdir: Path,
    mode: Mode,
    launches: int = 9,
    lock_clocks: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
    attempts: int = ATTEMPTS,
) -> tuple[dict[str, Any], npt.NDArray[np.float32]]:
    """Measure one `engine` on its `device`, with nothing to compare it to; and its answers, float32 [N, *answer].

    samples: float32 [N, C, H, W]; attempts: 1 not to go on after an interruption; the rest as for `benchmark`, of which
    status, reasons, latency, device and engines are returned. Raises StageError as that does, and for answers that are
    not finite.
    """
    settings = settings_of(mode, None, launches=launches, lock_clocks=lock_clocks, seed=seed)
    workdir.mkdir(parents=True, exist_ok=True)
    measured = measured_on(
        device, {engine.name: engine}, samples, settings, workdir, pictures=None,
        timeout=_timeout(launches, mode, samples), on_progress=on_progress, attempts=attempts,
    )  # fmt: skip
    table = table_from_latencies(workdir / f"{engine.name}_latency.npy", engine.name)
    answers = array_from(workdir / f"{engine.name}_logits.npy")
    if answers.shape != (len(samples), *answer) or not np.isfinite(answers).all():
        raise StageError(
            f'{engine.name} on "{device.url}" answered {list(answers.shape)}, or some numbers are not finite',
            allowed=f"expected: finite numbers {[len(samples), *answer]}",
            fix="check the precision, and see whether the engine runs by itself",
        )
    with understood(device.url):
        reasons = invalid_because(measured, {engine.name: table}, mode)
        launched = measured["models"][engine.name]
        return {
            "status": "INVALID" if reasons else "VALID",
            "reasons": reasons,
            "latency": {engine.name: latency(mode.headline(table), launched, engine.name)},
            "device": measured["device"],
            "engines": {engine.name: launched[0]["facts"]},
        }, answers


def _timeout(launches: int, mode: Mode, samples: npt.NDArray[np.float32]) -> float:
    """Seconds. Loading must not take forever, nor a query more than a second: it is there for a device that hangs."""
    return launches * SETUP_TIMEOUT_S + 2 * MAX_STRETCH * mode.seconds + len(samples)


def settings_of(
    mode: Mode, pictures: Pictures | None, *, launches: int, lock_clocks: bool, seed: int
) -> dict[str, Any]:
    """What the agent is told beside the models and samples, see `benchmark`. Raises RecipeError."""
    if launches < MIN_LAUNCHES:
        raise RecipeError(
            f"benchmark.launches = {launches} is too few for a 95 % interval",
            allowed=f"at least {MIN_LAUNCHES}",
            fix=f"--set benchmark.launches={MIN_LAUNCHES}",
        )
    return {
        "version": 1,
        "turns": [*mode.turns(), *([end_to_end.TURN] if pictures else [])],
        "launches": launches,
        "min_seconds": mode.seconds,
        "max_seconds": MAX_STRETCH * mode.seconds,
        "min_queries": MIN_QUERIES,
        "lock_clocks": lock_clocks,
        "seed": seed,
    }
