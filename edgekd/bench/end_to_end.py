"""From the stored picture to the answer: what a product waits for, beside what the model alone takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd import stats
from edgekd.bench.arrays import array_from
from edgekd.bench.latencies import speedups
from edgekd.bench.modes import turn
from edgekd.errors import StageError

# In the order of the columns of the agent's table, behind launch, block and start.
STEPS = ("decode", "resize", "normalise", "infer", "argmax")
TURN = turn() | {"end_to_end": True}


@dataclass(frozen=True)
class Pictures:
    """Images as their source stores them, and what they become: shape (C, H, W), mean and std on the 0..1 scale."""

    stored: list[bytes]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def write(self, folder: Path) -> dict[str, Any]:
        """A file each; what the agent is told of them, by their names on the device."""
        folder.mkdir(exist_ok=True)
        for number, data in enumerate(self.stored):
            (folder / str(number)).write_bytes(data)
        files = [f"pictures/{number}" for number in range(len(self.stored))]
        return {"files": files, "shape": self.shape, "mean": self.mean, "std": self.std}


def findings(measured: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """Latency of each model by step, and the speed-up with everything around it, None without a teacher.

    Raises StageError.
    """
    tables = {name: _table(workdir / f"{name}_end_to_end.npy", name) for name in measured["models"]}
    whole = {name: _as_latencies(table) for name, table in tables.items()}
    speedup = None
    if "teacher" in whole:
        value, interval = stats.median_interval(speedups(whole["student"], whole["teacher"]))
        speedup = {"value": value, "ci95": list(interval)}
    return {
        "decoder": measured["models"]["student"][0]["decoder"],
        "models": {name: _steps(table) for name, table in tables.items()},
        "speedup": speedup,
    }


def _steps(table: npt.NDArray[np.int64]) -> dict[str, Any]:
    steps = table[:, 3:] / 1e6
    p50, p90, p99 = np.quantile(steps.sum(1), [0.5, 0.9, 0.99])
    medians = {step: float(np.median(steps[:, column])) for column, step in enumerate(STEPS)}
    return {"p50_ms": float(p50), "p90_ms": float(p90), "p99_ms": float(p99), "n": len(steps), "steps_ms": medians}


def _as_latencies(table: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows as those of the model alone, see edgekd.bench.latencies."""
    nothing = np.zeros(len(table), np.int64)
    return np.column_stack([table[:, :3], table[:, 3:].sum(1), nothing + 1, nothing])


def _table(path: Path, name: str) -> npt.NDArray[np.int64]:
    """int64 [N, 8]: launch, block, start and the steps in ns."""
    table = array_from(path)
    if table.ndim != 2 or table.shape[1] != 3 + len(STEPS) or table.dtype != np.int64 or (table[:, 3:] < 0).any():
        raise StageError(
            f"{path.name} does not hold the steps of the {name}: {table.dtype} {list(table.shape)}",
            allowed=f"expected: int64 [N, {3 + len(STEPS)}], durations of 0 or more",
            fix="measure again: edgekd bench",
        )
    return table
