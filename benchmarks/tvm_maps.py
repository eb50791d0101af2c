"""TVM against ONNX Runtime where every pixel has an answer: U-Nets on images and on volumes, fp32 and INT8.

Batch 1, one thread, untuned. As in `tvm_cpu.py`, runtimes take turns within a round, timed by the thread's own clock,
and a ratio is taken per round.

    PYTHONPATH=benchmarks python benchmarks/tvm_maps.py [--rounds 40] [--report]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from results import spread, table, write_section
from torch import nn
from tvm_cpu import ACTIVATIONS, BACKENDS, PRECISIONS, SEGMENTS, engine, models, ratios, turn

from edgekd import registry
from edgekd.activations import multi_segment_layers
from edgekd.data import Shape
from edgekd.networks import build

CLASSES = 5
NETWORKS: dict[str, tuple[Shape, dict[str, Any]]] = {
    "image, 3x64x64, 16 channels": (Shape(3, 64, 64), {"channels": 16}),
    "image, 1x8x8, 8 channels": (Shape(1, 8, 8), {"channels": 8}),
    "volume, 1x16x32x32, 16 channels": (Shape(1, 32, 32, 16), {"channels": 16}),
    "volume, 1x8x16x16, 8 channels": (Shape(1, 16, 16, 8), {"channels": 8}),
}
SHOWN = ("ReLU", "LMA")


def network(shape: Shape, options: dict[str, Any], activation: str) -> nn.Module:
    """A U-Net with random weights, whose statistics have seen one batch."""
    made = build("unet", options, shape, CLASSES, ACTIVATIONS[activation], seed=0, maps=shape.dimensions[1:])
    random = torch.Generator().manual_seed(0)
    for _, layer in multi_segment_layers(made):
        nn.init.normal_(layer.slope_deltas, 0, 0.1, generator=random)
        nn.init.normal_(layer.biases, 0, 0.1, generator=random)
    with torch.no_grad():
        made(torch.randn(8, *shape.dimensions, generator=random))
    return made.eval()


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """A row for every activation and precision."""
    shape, options = NETWORKS[name]
    x = np.random.default_rng(0).standard_normal((1, *shape.dimensions)).astype(np.float32)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for activation in SHOWN:
            made = network(shape, options, activation)
            runners, facts = {}, {}
            for label, kind in BACKENDS.items():
                backend = registry.create("backend", kind)
                files = models(made, activation, backend, Path(folder, activation + label), shape.dimensions)
                for precision, model in files.items():
                    runners[precision, label], facts[precision, label] = engine(model, backend, "engine")
            for runner in runners.values():
                turn(runner, x)
            seconds = [{key: turn(runner, x) for key, runner in runners.items()} for _ in range(rounds)]
            for precision in PRECISIONS:
                tvm, ort = ((precision, label) for label in BACKENDS)
                found = {key[1]: 1e3 * statistics.median(took[key] for took in seconds) for key in (tvm, ort)}
                rows.append(
                    {"network": name, "activation": activation, "precision": precision, "ms": found, **facts[tvm]}
                    | {"over_onnxruntime": ratios(seconds, tvm, ort)}
                )
                print(name, activation, precision, spread(rows[-1]["over_onnxruntime"]), found, flush=True)
    return rows


def report(rows: list[dict[str, Any]], rounds: int) -> str:
    lines = [
        [
            f"{row['network']}, {row['activation']}, {row['precision'].upper()}",
            spread(row["over_onnxruntime"]),
            str(row["kernels"]),
            f"{row['int8_kernels']}" if row["precision"] == "int8" else "",
            f"{row['compile_s']:.1f}",
        ]
        for row in rows
    ]
    version, cpu = rows[0]["version"], rows[0]["providers"][0]
    return (
        f"Latency of TVM {version}, untuned, over ONNX Runtime {onnxruntime.__version__}: U-Nets of two levels, batch"
        f" 1, one thread, {cpu}; LMA has {SEGMENTS} segments, each runtime runs the form that it is fastest in, and"
        f" INT8 in its own dialect. Median of {rounds} interleaved rounds (10th to 90th percentile). INT8 kernels"
        " are those that sum products of codes.\n\n"
        + table(["U-Net", "TVM / ORT", "TVM kernels", "INT8 kernels", "TVM compiles, s"], lines)
        + "\n\nMade by `benchmarks/tvm_maps.py`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    asked = parser.parse_args()
    rows = [row for name in NETWORKS for row in measure(name, asked.rounds)]
    if asked.report:
        write_section("tvm_maps", "TVM against ONNX Runtime: an answer for every pixel", report(rows, asked.rounds))


if __name__ == "__main__":
    main()
