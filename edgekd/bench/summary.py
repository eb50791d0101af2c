"""The result of a measurement: a pure function of what the agent wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd import stats, tasks
from edgekd.bench.latencies import DURATION, SAMPLES, Table, computing_ns
from edgekd.bench.modes import Mode
from edgekd.bench.validity import invalid_because


def summarize(
    measured: Mapping[str, Any],
    tables: Mapping[str, Table],
    quality: Mapping[str, npt.NDArray[Any]],
    mode: Mode,
) -> dict[str, Any]:
    """The result of a measurement, ready for JSON. measured: what the agent wrote; quality: [N] by model."""
    reasons = invalid_because(measured, tables, mode)
    return {
        "status": "INVALID" if reasons else "VALID",
        "reasons": reasons,
        "mode": {"name": mode.name, **mode.findings(measured, tables)},
        "latency": {name: latency(mode.headline(tables[name]), measured["models"][name], name) for name in tables},
        "accuracy": {name: _accuracy(quality[name], name) for name in quality},
        **_compared(tables, quality, mode),
        "telemetry": _telemetry(measured["telemetry"], measured["device"]["cores"]),
        "device": measured["device"],
        "energy": {name: _energy(launches) for name, launches in measured["models"].items()},
        "interruptions": measured["interruptions"],
        "engines": {name: launches[0]["facts"] for name, launches in measured["models"].items()},
    }


def _compared(tables: Mapping[str, Table], quality: Mapping[str, npt.NDArray[Any]], mode: Mode) -> dict[str, Any]:
    """The student against the teacher; None where a student was measured alone."""
    if "teacher" not in tables:
        return {"speedup": None, "accuracy_change": None, "speedup_by_launch": []}
    launches = mode.speedups(tables["student"], tables["teacher"])
    speedup, interval = stats.median_interval(launches)
    return {
        "speedup": {"value": speedup, "ci95": list(interval), "of": mode.compares},
        "accuracy_change": tasks.change(quality["teacher"], quality["student"]),
        "speedup_by_launch": launches.tolist(),
    }


def _telemetry(rows: list[dict[str, Any]], cores: int) -> dict[str, Any]:
    """The agent's rows as series: seconds since the start, and readings named with their unit."""
    zones = sorted({zone for row in rows for zone in row["temperature_c"]})
    series: dict[str, list[float | None]] = {
        f"{zone}_c": [row["temperature_c"].get(zone) for row in rows] for zone in zones
    }
    series["clock_hz"] = [max(row["clock_hz"], default=None) for row in rows]
    series["gpu_clock_hz"] = [row["gpu_clock_hz"] for row in rows]
    series["gpu_load_share"] = [row["gpu_load"] for row in rows]
    series["load_average"] = [row["load_average"] for row in rows]
    for rail in sorted({rail for row in rows for rail in row["power_mw"]}):
        series[f"{rail}_mw"] = [row["power_mw"].get(rail) for row in rows]
    series["throttled_flags"] = [row["throttled"] for row in rows]
    for name in ("foreign_cpu", "steal"):
        series[f"{name}_share"] = [
            None if row.get(f"{name}_s") is None else max(0.0, row[f"{name}_s"] / (row["seconds"] * cores))
            for row in rows
        ]
    known = {name: values for name, values in series.items() if any(value is not None for value in values)}
    return {"time_s": [row["time_s"] for row in rows], "series": known}


def latency(table: Table, launches: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Of queries of one size."""
    values = table[:, DURATION] / 1e6
    p50, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
    peaks = [launch["peak_rss_bytes"] for launch in launches if launch["peak_rss_bytes"] is not None]
    return {
        "p50_ms": float(p50),
        "p90_ms": float(p90),
        "p99_ms": float(p99),
        "p90_early_stopping_ms": stats.early_stopping_percentile(values, 0.90),
        "p99_early_stopping_ms": stats.early_stopping_percentile(values, 0.99),
        "mean_ms": float(values.mean()),
        "std_ms": float(values.std(ddof=1)),
        "n": len(values),
        "samples_per_query": int(table[0, SAMPLES]),
        "warmup_n": sum(one["queries"] for launch in launches for one in launch["warm_up"]),
        "throughput_per_s": float(1e9 * table[0, SAMPLES] / computing_ns(table).mean()),
        "import_ms": float(np.median([launch["import_ms"] for launch in launches])),
        "load_ms": float(np.median([launch["load_ms"] for launch in launches])),
        "peak_rss_bytes": max(peaks, default=None),
        "samples_file": f"{name}_latency.npy",
    }


def _energy(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Energy of one inference by rail, in the turns that the headline's latency is of: the median of the launches."""
    by_rail: dict[tuple[str, str], list[float]] = {}
    for launch in launches:
        for row in launch["energy"]:
            if row["turn"] == 0:
                by_rail.setdefault((row["rail"], row["sensor"]), []).append(row["mj"] / row["samples"])
    return [
        {"rail": rail, "sensor": sensor, "per_inference_mj": float(np.median(values)), "launches": len(values)}
        for (rail, sensor), values in by_rail.items()
    ]


def _accuracy(quality: npt.NDArray[Any], name: str) -> dict[str, Any]:
    return tasks.summary(quality) | {"logits_file": f"{name}_logits.npy"}
