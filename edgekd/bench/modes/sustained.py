"""Minutes without a pause, for boards that get hot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from edgekd import stats
from edgekd.bench.latencies import START, Table, computing_ns, rounds
from edgekd.bench.modes import Mode, turn
from edgekd.bench.validity import throttling
from edgekd.registry import register

WINDOWS = 20
MIN_ROUNDS = 6  # of a window: fewer give no 95 % interval


@register("mode", "sustained")
class Sustained(Mode):
    """The models in turn for minutes without a pause: latency against temperature, and who is ahead at the end.

    Throttling, drift and changed clocks are what it looks for, and do not make its result INVALID.
    """

    name: ClassVar = "sustained"
    looks_for: ClassVar = ("throttled", "clocks changed", "unstable")

    def __init__(self, *, seconds: float = 600.0) -> None:
        super().__init__(seconds)

    def turns(self) -> list[dict[str, Any]]:
        """One sample a query."""
        return [turn()]

    def findings(self, measured: Mapping[str, Any], tables: Mapping[str, Table]) -> dict[str, Any]:
        """The time cut into windows, each with the models' latency and what the sensors said; both ends compared."""
        by_round = {name: rounds(table) for name, table in tables.items()}
        count = len(by_round["student"])
        windows = np.array_split(np.arange(count), max(1, min(WINDOWS, count // MIN_ROUNDS)))
        rows = [_window(by_round, window, measured["telemetry"]) for window in windows]
        return {
            "windows": rows,
            "slower": {name: rows[-1]["p50_ms"][name] / rows[0]["p50_ms"][name] - 1 for name in tables},
            "throttling": throttling(measured["telemetry"]),
        }


def _window(by_round: Mapping[str, list[Table]], window: Any, telemetry: list[dict[str, Any]]) -> dict[str, Any]:
    medians = {
        name: np.array([np.median(computing_ns(tables[i])) for i in window]) for name, tables in by_round.items()
    }
    rows = [table for tables in by_round.values() for table in (tables[window[0]], tables[window[-1]])]
    start, end = (float(end) / 1e9 for end in (min(t[0, START] for t in rows), max(t[-1, START] for t in rows)))
    readings = [row for row in telemetry if start <= row["time_s"] <= end + row["seconds"]]
    p50_ms = {name: float(np.median(values)) / 1e6 for name, values in medians.items()}
    speedup = None
    if "teacher" in medians:
        ratio, interval = stats.median_interval(medians["teacher"] / medians["student"])
        speedup = {"value": ratio, "ci95": list(interval)}
    return {
        "start_s": start,
        "end_s": end,
        "p50_ms": p50_ms,
        "rank": sorted(p50_ms, key=lambda name: p50_ms[name]),
        "speedup": speedup,
        "temperature_c": _median([max(row["temperature_c"].values()) for row in readings if row["temperature_c"]]),
        "clock_hz": _median([max(row["clock_hz"]) for row in readings if row["clock_hz"]]),
    }


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None
