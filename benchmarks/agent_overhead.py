"""How much the agent adds to a latency: its p50 over that of a plain onnxruntime loop on the same engine.

    python benchmarks/agent_overhead.py [MODEL.onnx] [--pairs 10] [--seconds 2] [--report]

The two are run in turns, each in a fresh process; prints the median of the ratios with its 95 % interval. Without a
model, an untrained ResNet-20 for 32x32 images is measured: how long a network takes does not depend on its weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from results import write_section

from edgekd import networks, registry, stats
from edgekd.bench.latencies import DURATION
from edgekd.bench.modes.single_stream import SingleStream
from edgekd.data import Shape
from edgekd.device import AGENT
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
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        board = Path(folder)
        prepare(board, arguments.model or resnet20(board), arguments.seconds)
        pairs = [(agent_p50(board), plain_p50(board, arguments.seconds)) for _ in range(arguments.pairs)]
    ratios = np.array(pairs)[:, 0] / np.array(pairs)[:, 1]
    for agent, plain in pairs:
        print(f"agent {agent:.5f} ms   plain loop {plain:.5f} ms   ratio {agent / plain:.4f}")
    value, (low, high) = stats.median_interval(ratios)
    found = f"ratio {value:.4f}, 95 % interval {low:.4f} to {high:.4f}, {len(pairs)} pairs of {arguments.seconds:g} s"
    print(found)
    if arguments.report:
        name = arguments.model.name if arguments.model else "ResNet-20"
        body = (
            f"p50 of the agent over that of a plain loop, {name}: {found}.\n\nMade by `benchmarks/agent_overhead.py`."
        )
        write_section("agent_overhead", "What the agent adds to a latency", body)


def resnet20(folder: Path) -> Path:
    """An untrained ResNet-20 as ONNX."""
    network = networks.build("resnet", {"depth": 20}, Shape(3, 32, 32), 10, ("relu", {}), seed=0)
    model = folder / "resnet20.onnx"
    example = np.zeros((1, 3, 32, 32), np.float32)
    export(network.eval(), model, example=example, opset=20, dynamic_batch=False, form="step_sum", metadata={})
    return model


def prepare(board: Path, model: Path, seconds: float) -> None:
    """A job's folder for the agent, with one model."""
    backend = registry.create("backend", "onnxruntime")
    (board / "model").mkdir()
    backend.compile(model, board / "model", threads=1)
    shape = [size.dim_value for size in onnx.load(str(model)).graph.input[0].type.tensor_type.shape.dim[1:]]
    np.save(board / "samples.npy", np.random.default_rng(0).standard_normal((64, *shape)).astype(np.float32))
    spec = {
        "version": 1,
        "turns": SingleStream().turns(),
        "launches": 1,
        "models": [{"name": "model", "folder": "model", "runner": str(backend.runner)}],
        "samples": "samples.npy",
        "files": {},
        "min_seconds": seconds,
        "max_seconds": 10 * seconds,
        "min_queries": 64,
        "lock_clocks": False,
        "seed": 0,
    }
    (board / "spec.json").write_text(json.dumps(spec))
    (board / "agent").symlink_to(AGENT)


def agent_p50(board: Path) -> float:
    """The p50 in ms that the agent measures."""
    subprocess.run([sys.executable, "-m", "agent", "bench", "spec.json"], cwd=board, check=True, capture_output=True)
    return float(np.median(np.load(board / "model_latency.npy")[:, DURATION]) / 1e6)


def plain_p50(board: Path, seconds: float) -> float:
    """The p50 in ms of a loop that does nothing else."""
    argv = [sys.executable, "-c", PLAIN_LOOP, "model/model.onnx", "samples.npy", str(seconds)]
    return float(subprocess.run(argv, cwd=board, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
