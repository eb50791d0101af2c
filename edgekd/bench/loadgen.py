"""The same engines under MLPerf's own load generator, on this machine: a check of our timing by somebody else's.

    python -m edgekd.bench.loadgen FOLDER RUNNER SAMPLES.npy SECONDS OUT      # one engine; its logs are in OUT then

LoadGen issues a query and measures until it is told that the query is answered (MLPerf Inference Rules, single stream).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.backends import Engine, load_runner
from edgekd.bench.validity import MIN_QUERIES
from edgekd.device.process import run
from edgekd.errors import MissingError, StageError

PACKAGE = "mlcommons-loadgen"
TURNS = 3
HOT_SAMPLES = 64
WARM_UP_S = 0.3
START_UP_TIMEOUT_S = 120.0
PERCENTILES = ("50.00", "90.00", "99.00")


def require() -> None:
    """Raises MissingError where LoadGen is not installed."""
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise MissingError(
            f"benchmark.loadgen needs the Python package {PACKAGE}, which is not installed",
            allowed="it has wheels for Linux on x86_64; everything else of edgekd bench works without it",
            fix="pip install 'edgekd[loadgen]', or leave out --loadgen",
        )


def cross_check(
    engines: Mapping[str, Engine], samples: npt.NDArray[np.float32], *, seconds: float, found: Mapping[str, Any]
) -> dict[str, Any]:
    """What LoadGen measures of the engines, in turns of fresh processes, beside the `latency` that the agent `found`.

    samples: float32 [N, C, H, W]; seconds: for all together. Raises MissingError, StageError.
    """
    require()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/samples.npy", samples[:HOT_SAMPLES])
        for turn in range(TURNS):
            for name in sorted(engines, reverse=bool(turn % 2)):
                out = Path(folder, f"{name}-{turn}")
                out.mkdir()
                runs[name].append(
                    timed(engines[name], Path(folder, "samples.npy"), seconds / TURNS / len(engines), out)
                )
    return {
        "version": importlib.metadata.version(PACKAGE),
        "models": {name: _beside(rows, found[name]["p50_ms"]) for name, rows in runs.items()},
    }


def _beside(rows: list[dict[str, float]], agent_p50_ms: float) -> dict[str, Any]:
    """The medians of the turns; how far the agent's p50 is from LoadGen's."""
    medians: dict[str, float] = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    by_turn = [row["p50_ms"] for row in rows]
    return (
        medians
        | {"n": int(sum(row["n"] for row in rows)), "p50_by_turn_ms": by_turn}
        | {
            "agent_p50_ms": agent_p50_ms,
            "agent_over_loadgen": agent_p50_ms / medians["p50_ms"],
        }
    )


def timed(engine: Engine, samples: Path, seconds: float, out: Path) -> dict[str, float]:
    """One engine in a process of its own, with the threads that it was compiled for: percentiles in ms and their `n`.

    samples: a file of float32 [N, C, H, W]; out: an empty folder, for LoadGen's logs.
    """
    threads = json.loads((engine.folder / "engine.json").read_text(encoding="utf-8"))["threads"]
    variables = [f"{name}_NUM_THREADS={threads}" for name in ("OMP", "OPENBLAS", "MKL")]
    child = [
        sys.executable,
        "-m",
        __name__,
        str(engine.folder),
        str(engine.runner),
        str(samples),
        str(seconds),
        str(out),
    ]
    timeout = START_UP_TIMEOUT_S + 10 * seconds
    run(["env", *variables, *child], cwd=None, timeout=timeout, name="LoadGen").check(f"LoadGen with the {engine.name}")
    return _from_log(out / "mlperf_log_detail.txt")


def _from_log(log: Path) -> dict[str, float]:
    """What LoadGen concluded: lines of `:::MLLOG {json}`."""
    said = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith(":::MLLOG "):
            entry = json.loads(line.removeprefix(":::MLLOG "))
            said[entry["key"]] = entry["value"]
    try:
        percentiles = {f"p{one[:2]}_ms": said[f"result_{one}_percentile_latency_ns"] / 1e6 for one in PERCENTILES}
        return percentiles | {"n": said["result_query_count"]}
    except KeyError as error:
        raise StageError(
            f"LoadGen's log has no {error}",
            allowed=f"made for the {PACKAGE} of edgekd[loadgen]",
            fix="install that one",
        ) from error


def _serve(folder: str, runner: str, samples: str, seconds: float, out: str) -> None:
    """Let LoadGen ask one engine for so many seconds."""
    import mlperf_loadgen as lg

    inputs = [x[None] for x in np.load(samples)]
    infer = load_runner(Engine("engine", Path(folder), Path(runner), "loadgen")).run
    until = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < until:
        infer(inputs[0])

    def issue(queries: list[Any]) -> None:
        for query in queries:
            infer(inputs[query.index])
            lg.QuerySamplesComplete([lg.QuerySampleResponse(query.id, 0, 0)])

    settings, logs = lg.TestSettings(), lg.LogSettings()
    settings.scenario, settings.mode = lg.TestScenario.SingleStream, lg.TestMode.PerformanceOnly
    settings.min_duration_ms, settings.min_query_count = round(1e3 * seconds), MIN_QUERIES
    logs.enable_trace, logs.log_output.outdir, logs.log_output.copy_summary_to_stdout = False, out, False
    system = lg.ConstructSUT(issue, lambda: None)
    library = lg.ConstructQSL(len(inputs), len(inputs), lambda indices: None, lambda indices: None)
    lg.StartTestWithLogSettings(system, library, settings, logs, "")
    lg.DestroyQSL(library)
    lg.DestroySUT(system)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5])
