"""How much the agent adds to a latency: its p50 over that of a plain onnxruntime loop, and of MLPerf's LoadGen.

    python benchmarks/agent_overhead.py [MODEL.onnx] [--turns 10] [--seconds 2] [--report]

The three are run in turns on the same engine; prints the medians of the ratios with their 95 % intervals. Each is a
fresh process in a session of its own: on a busy machine Linux shares the CPU by sessions, and whoever has another one
than its rivals is timed 5 to 10 % slower. Without a model, an untrained ResNet-20 for 32x32 images is measured: how
long a network takes does not depend on its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from results import table, write_section

from edgekd import networks, registry, stats
from edgekd.backends import Engine
from edgekd.bench import loadgen
from edgekd.bench.latencies import DURATION
from edgekd.bench.modes.single_stream import SingleStream
from edgekd.data import Shape
from edgekd.device import AGENT
from edgekd.device.process import run
from edgekd.export import export

PLAIN_LOOP = """
import sys, time, numpy, onnxruntime
model, samples, seconds = sys.argv[1], numpy.load(sys.argv[2]), float(sys.argv[3])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
feeds = [{session.get_inputs()[0].name: sample[None]} for sample in samples]
for warm_up in (True, False):
    durations, until = [], time.perf_counter() + (0.3 if warm_up else seconds)
    while time.perf_counter() < until:
        for feed in feeds:
            start = time.perf_counter_ns()
            session.run(None, feed)
            durations.append(time.perf_counter_ns() - start)
print(numpy.median(durations) / 1e6)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        board = Path(folder)
        prepare(board, arguments.model or resnet20(board), arguments.seconds)
        timings = [agent_p50, plain_p50, loadgen_p50]
        turns = [[p50(board, arguments.seconds) for p50 in timings] for _ in range(arguments.turns)]
    rows = []
    for column, name in ((1, "a plain loop"), (2, "LoadGen")):
        ratios = np.array([turn[0] / turn[column] for turn in turns])
        value, (low, high) = stats.median_interval(ratios)
        rows.append([name, f"{value:.4f}", f"{low:.4f} to {high:.4f}", f"{ratios.min():.4f} to {ratios.max():.4f}"])
    text = table(["p50 of the agent over that of", "median", "95 % interval", "all turns"], rows)
    print(text)
    if arguments.report:
        name = arguments.model.name if arguments.model else "ResNet-20"
        how = f"{name}, {len(turns)} turns of {arguments.seconds:g} s each, load average {os.getloadavg()[0]:.1f}."
        body = f"{how}\n\n{text}\n\nMade by `benchmarks/agent_overhead.py`."
        write_section("agent_overhead", "What the agent adds to a latency", body)


def resnet20(folder: Path) -> Path:
    """An untrained ResNet-20 as ONNX."""
    network = networks.build("resnet", {"depth": 20}, Shape(3, 32, 32), 10, ("relu", {}), seed=0)
    model = folder / "resnet20.onnx"
    example = np.zeros((1, 3, 32, 32), np.float32)
    export(network.eval(), model, example=example, opset=20, dynamic_batch=False, form="step_sum", metadata={})
    return model


def prepare(
    board: Path, model: Path, seconds: float, *, names: Sequence[str] = ("model",), launches: int = 1, seed: int = 0
) -> None:
    """A job's folder for the agent, with the same engine under each name."""
    backend = registry.create("backend", "onnxruntime")
    for name in names:
        (board / name).mkdir()
        backend.compile(model, board / name, threads=1)
    shape = [size.dim_value for size in onnx.load(str(model)).graph.input[0].type.tensor_type.shape.dim[1:]]
    np.save(board / "samples.npy", np.random.default_rng(0).standard_normal((64, *shape)).astype(np.float32))
    spec = {
        "version": 1,
        "turns": SingleStream().turns(),
        "launches": launches,
        "models": [{"name": name, "folder": name, "runner": str(backend.runner)} for name in names],
        "samples": "samples.npy",
        "pictures": None,
        "files": {},
        "min_seconds": seconds,
        "max_seconds": 10 * seconds,
        "min_queries": 64,
        "lock_clocks": False,
        "seed": seed,
    }
    (board / "spec.json").write_text(json.dumps(spec))
    (board / "agent").symlink_to(AGENT)


def agent_p50(board: Path, seconds: float) -> float:
    """The p50 in ms that the agent measures."""
    run([sys.executable, "-m", "agent", "bench", "spec.json"], cwd=board, timeout=600, name="agent").check("the agent")
    return float(np.median(np.load(board / "model_latency.npy")[:, DURATION]) / 1e6)


def plain_p50(board: Path, seconds: float) -> float:
    """The p50 in ms of a loop that does nothing else."""
    argv = [sys.executable, "-c", PLAIN_LOOP, "model/model.onnx", "samples.npy", str(seconds)]
    return float(run(argv, cwd=board, timeout=600, name="plain loop").stdout)


def loadgen_p50(board: Path, seconds: float) -> float:
    """The p50 in ms that LoadGen measures."""
    runner = registry.create("backend", "onnxruntime").runner
    with tempfile.TemporaryDirectory() as logs:
        engine = Engine("model", board / "model", runner, "onnxruntime")
        return loadgen.timed(engine, board / "samples.npy", seconds, Path(logs))["p50_ms"]


if __name__ == "__main__":
    main()
