"""What the agent would have written of runs on a device, made from formulas."""

from __future__ import annotations

import copy

import numpy as np

LAUNCHES, ROUNDS, QUERIES = 9, 6, 20
CORRECT = {"student": np.arange(200) % 10 > 0, "teacher": np.arange(200) % 20 > 0}


def table(ms, *, noise=0.01, drift=0.0, seed=0, samples=1):
    """Latencies as the agent writes them: `ms` with noise, and slower by the share `drift` at the end."""
    rng = np.random.default_rng(seed)
    launch, block, _ = np.indices((LAUNCHES, 2 * ROUNDS, QUERIES)).reshape(3, -1)
    duration = ms * 1e6 * rng.lognormal(0, noise, launch.size) * np.linspace(1, 1 + drift, launch.size)
    start, nothing = np.arange(launch.size) * 10**6, np.zeros(launch.size)
    return np.stack([launch, block, start, duration, nothing + samples, nothing], axis=1).astype(np.int64)


def tables(**changes):
    return {"student": table(1.0, seed=1, **changes), "teacher": table(3.0, seed=2, **changes)}


def measured(turns=1, **row):
    """What the agent says of a quiet run on 4 cores, changed by `row` in the telemetry."""
    quiet = {
        "launch": 0, "seconds": 0.5, "own_cpu_s": 0.5, "foreign_cpu_s": 0.02, "steal_s": 0.0,
        "load_average": 0.3, "clock_hz": [1_500_000_000] * 4, "gpu_clock_hz": None, "gpu_load": None,
        "temperature_c": {"cpu": 50.0}, "power_mw": {}, "throttled": None, "throttle_count": 0,
    }  # fmt: skip
    launch = {
        "facts": {"runtime": "null"}, "import_ms": 1.0, "load_ms": 2.0, "rss_before_load_bytes": 1,
        "peak_rss_bytes": 2, "energy": [],
        "warm_up": [{"queries": 10, "stable": True, "median_ns": 1, "batched": True}] * turns,
    }  # fmt: skip
    return {
        "version": 1,
        "models": {name: [copy.deepcopy(launch) for _ in range(LAUNCHES)] for name in ("student", "teacher")},
        "telemetry": [quiet | row | {"time_s": 0.5 * i} for i in range(20)],
        "device": {"cores": 4, "machine": "aarch64", "emulated": False},
        "interruptions": 0,
    }
