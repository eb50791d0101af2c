"""Frames that arrive on a clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from edgekd import stats
from edgekd.bench.latencies import DURATION, WAITED, Table, computing_ns
from edgekd.bench.modes import Mode, required, turn
from edgekd.registry import register

FRAMES_A_BLOCK = 10  # at least: a queue needs some frames to form
MAX_BLOCK_S = 1.0
BLOCKS = 60  # at least, in the time that there is


@register("mode", "fps")
class Fps(Mode):
    """Frames arrive on a clock, as from a camera: which share is answered before the next one is there.

    A frame that arrives while another is computed waits, and its waiting counts. Blocks of frames of both models take
    turns, each beginning with an empty queue. Between frames the machine idles and may lower its clocks: changed clocks
    are a part of what is measured here.
    """

    name: ClassVar = "fps"
    compares: ClassVar = "median time to compute a frame"
    looks_for: ClassVar = ("clocks changed",)

    def __init__(self, *, seconds: float = 60.0, fps: float = 30.0) -> None:
        super().__init__(seconds)
        required(fps > 0, "fps", fps, "frames per second, above 0")
        self.fps = fps

    def turns(self) -> list[dict[str, Any]]:
        """One frame a period."""
        block_seconds = max(FRAMES_A_BLOCK / self.fps, min(MAX_BLOCK_S, self.seconds / BLOCKS))
        return [turn(every_ns=round(1e9 / self.fps), block_seconds=block_seconds)]

    def findings(self, measured: Mapping[str, Any], tables: Mapping[str, Table]) -> dict[str, Any]:
        """The share of deadlines missed, how long frames waited, and how busy each model was."""
        return {"fps": self.fps, "models": {name: self._kept_up(table) for name, table in tables.items()}}

    def _kept_up(self, table: Table) -> dict[str, Any]:
        period_ms, computing = 1e3 / self.fps, computing_ns(table) / 1e6
        missed, frames = int((table[:, DURATION] / 1e6 > period_ms).sum()), len(table)
        return {
            "frames": frames,
            "missed": missed,
            "missed_share": missed / frames,
            "ci95": list(stats.wilson(missed, frames)),
            "computing_p50_ms": float(np.median(computing)),
            "waited_p99_ms": float(np.quantile(table[:, WAITED] / 1e6, 0.99)),
            "busy_share": float(computing.mean() / period_ms),
            "highest_fps": float(1e3 / computing.mean()),
        }
