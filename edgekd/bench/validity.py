"""Whether a measurement holds: VALID when the machine was so quiet and steady that it would repeat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgekd import stats
from edgekd.bench.latencies import Table, computing_ns, rounds
from edgekd.bench.modes import Mode

MIN_QUERIES = 64  # MLPerf: below this no p90 holds with 99 % confidence
# Each limit with its reason:
MAX_FOREIGN_CPU = 0.10  # share of all cores that others used; above it they compete for cores, cache and clock
MAX_STEAL = 0.02  # share of all cores' time that the hypervisor gave to other machines
MAX_UNSETTLED = 0.25  # share of launches whose warm-up did not settle; a single one is absorbed by the medians
MAX_BLOCK_CV = 0.05  # spread of the blocks' medians; trtexec warns above 2.5 %, on boards with locked clocks
MAX_TREND = 0.05  # from the first third to the last: heat or clocks moved the whole result
MAX_CLOCK_CHANGE = 0.05  # of the fastest core's clock, 5th to 95th percentile over the run
BUSY_GPU = 0.1  # share of the time that it works; less, and the models do not run there
# The flags of a Raspberry Pi's firmware that tell of the present.
THROTTLED = {
    1: "the supply voltage was too low: use the board's own power supply",
    2: "the firmware capped the clock",
    4: "the firmware throttled the board",
    8: "the temperature reached its soft limit: cool the board",
}


def invalid_because(measured: Mapping[str, Any], tables: Mapping[str, Table], mode: Mode) -> list[str]:
    """Why the measurement does not hold; empty when it does."""
    reasons = []
    for name, table in tables.items():
        warm_ups = [one for launch in measured["models"][name] for one in launch["warm_up"]]
        unsettled = sum(not one["stable"] for one in warm_ups)
        if unsettled > MAX_UNSETTLED * len(warm_ups):
            reasons.append(f"unstable: the {name} did not settle in {unsettled} of {len(warm_ups)} warm-ups")
        for where, rows in mode.series(table).items():
            reasons += _unsteady(rows, name + where)
    if measured["device"]["emulated"]:
        reasons.append(f"emulated: {measured['device']['machine']} is emulated there, its times are not a board's")
    reasons += _disturbances(measured["telemetry"], measured["device"]["cores"]) + throttling(measured["telemetry"])
    return [reason for reason in reasons if not reason.startswith(mode.looks_for)]


def _unsteady(table: Table, name: str) -> list[str]:
    """Whether queries of one kind are enough, and alike from the first to the last."""
    reasons = []
    medians = np.array([np.median(computing_ns(rows)) for rows in rounds(table)])
    if len(table) < MIN_QUERIES:
        reasons.append(f"too short: {len(table)} queries of the {name}, at least {MIN_QUERIES} are needed for p90")
    if (cv := stats.robust_cv(medians)) > MAX_BLOCK_CV:
        reasons.append(f"unstable: the {name}'s medians vary by {cv:.1%} over time, at most {MAX_BLOCK_CV:.0%} allowed")
    if abs(drift := stats.trend(medians)) > MAX_TREND:
        reasons.append(f"unstable: the {name}'s latency drifted by {drift:+.1%}, at most {MAX_TREND:.0%} allowed")
    return reasons


def _disturbances(telemetry: list[dict[str, Any]], cores: int) -> list[str]:
    """What else the machine did meanwhile."""
    reasons, seconds = [], sum(row["seconds"] for row in telemetry)
    for key, limit, what in (
        ("foreign_cpu_s", MAX_FOREIGN_CPU, "other processes used"),
        ("steal_s", MAX_STEAL, "the hypervisor took away"),
    ):
        share = sum(row.get(key, 0.0) for row in telemetry) / (seconds * cores)
        if share > limit:
            reasons.append(f"foreign load: {what} {share:.0%} of the CPU, at most {limit:.0%} allowed")
    clocks = {
        "": [max(row["clock_hz"]) for row in telemetry if row["clock_hz"]],
        # An idle GPU's clock moves with the desktop.
        "the GPU's ": [row["gpu_clock_hz"] for row in telemetry if (row["gpu_load"] or 0) > BUSY_GPU],
    }
    for whose, hertz in clocks.items():
        low, high = np.quantile([hz for hz in hertz if hz] or [1], [0.05, 0.95])
        if high / low - 1 > MAX_CLOCK_CHANGE:
            reasons.append(f"clocks changed: {whose}from {low / 1e6:.0f} to {high / 1e6:.0f} MHz during the run")
    return reasons


def throttling(telemetry: list[dict[str, Any]]) -> list[str]:
    """What the device itself says of power and heat."""
    flags = {row["throttled"] or 0 for row in telemetry}
    reasons = [f"throttled: {what}" for bit, what in THROTTLED.items() if any(flag & bit for flag in flags)]
    counts = [row["throttle_count"] for row in telemetry]
    if counts and max(counts) > min(counts):
        reasons.append(f"throttled: the processor slowed down {max(counts) - min(counts)} times because it was too hot")
    return reasons
