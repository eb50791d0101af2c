"""TVM against ONNX Runtime in fp32 and INT8, untuned and tuned, ReLU and LMA: what a compiler gains at inference.

Batch 1, one thread, 3x32x32. The contenders take turns within a round and are timed by the thread's own clock, which
other programs disturb less than the wall's; a ratio is taken per round, and its median, 10th and 90th percentile given.

    python benchmarks/tvm_cpu.py [--rounds 40] [--networks "ResNet-20" ...] [--minutes 2] [--json] [--report]

Each model is tuned for --minutes; results of tuning are kept from one model to the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from results import spread, summary, table, write_section
from torch import nn

from edgekd import registry
from edgekd.activations import multi_segment_layers
from edgekd.backends import Backend, Engine, load_runner
from edgekd.data import Shape
from edgekd.export import export
from edgekd.networks import build
from edgekd.quantize import dialects, ptq

RUNS_PER_TURN = 4
SHAPE, CLASSES, SEGMENTS = Shape(3, 32, 32), 10, 8
IMAGE = SHAPE.channels, SHAPE.height, SHAPE.width
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "LMA student 3": ("lma_student", {"size": 3}),
    "ResNet-20": ("resnet", {"depth": 20}),
    "WRN-16-2": ("wrn", {"depth": 16, "k": 2}),
    "MobileNetV2": ("mobilenet_v2", {}),
}
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ReLU": ("relu", {}),
    "LMA": ("lma", {"k": SEGMENTS}),
    "LMA continuous": ("lma", {"k": SEGMENTS, "continuous": True}),
}
BACKENDS = {"TVM": "tvm", "ONNX Runtime": "onnxruntime"}
TUNED = "TVM tuned"
CONTENDERS = ("TVM", TUNED, "ONNX Runtime")
PRECISIONS = ("fp32", "int8")


def network(name: str, activation: str) -> nn.Module:
    """With random weights and activations, whose statistics have seen one batch."""
    made = build(*NETWORKS[name], SHAPE, CLASSES, ACTIVATIONS[activation], seed=0)
    random = torch.Generator().manual_seed(0)
    for _, layer in multi_segment_layers(made):
        nn.init.normal_(layer.slope_deltas, 0, 0.1, generator=random)
        nn.init.normal_(layer.biases, 0, 0.1, generator=random)
    with torch.no_grad():
        made(torch.randn(16, *IMAGE, generator=random))
    return made.eval()


def models(
    network: nn.Module, activation: str, backend: Backend, folder: Path, image: tuple[int, ...] = IMAGE
) -> dict[str, Path]:
    """The network by precision, in the form and the dialect that the backend runs fastest."""
    form = backend.forms["continuous" if "continuous" in activation else "any"]
    folder.mkdir()
    files = {precision: folder / f"{precision}.onnx" for precision in PRECISIONS}
    images = np.random.default_rng(1).standard_normal((16, *image)).astype(np.float32)
    export(network, files["fp32"], example=images[:1], opset=20, dynamic_batch=False, form=form, metadata={})
    int8 = ptq.prepare(files["fp32"], images).quantized("minmax", 100)
    onnx.save(dialects.translated(int8, backend.dialect), files["int8"])
    return files


def engine(model: Path, backend: Backend, name: str) -> tuple[Any, dict[str, Any]]:
    """The model's runner, and what compile said."""
    folder = model.with_suffix(f".{name}")
    folder.mkdir()
    start = time.perf_counter()
    facts = backend.compile(model, folder, threads=1)
    facts["compile_s"] = time.perf_counter() - start
    return load_runner(Engine("benchmark", folder, backend.runner, backend.name)), facts


def measure(name: str, rounds: int, minutes: float, kept: Path) -> list[dict[str, Any]]:
    """A row for every activation and precision: both runtimes, and each runtime's LMA over its own ReLU."""
    x = np.random.default_rng(0).standard_normal((1, *IMAGE)).astype(np.float32)
    backends = {label: registry.create("backend", backend) for label, backend in BACKENDS.items()}
    tuner = registry.create("backend", "tvm", options={"tuning": {"minutes": minutes}})
    tuner.kept = kept
    with tempfile.TemporaryDirectory() as folder:
        runners, facts = {}, {}
        for activation in ACTIVATIONS:
            made = network(name, activation)
            for label, backend in backends.items():
                for precision, model in models(made, activation, backend, Path(folder, activation + label)).items():
                    key = activation, precision, label
                    runners[key], facts[key] = engine(model, backend, "engine")
                    if label == "TVM":
                        key = activation, precision, TUNED
                        runners[key], facts[key] = engine(model, tuner, "tuned")
        for runner in runners.values():
            turn(runner, x)
        seconds = [{key: turn(runner, x) for key, runner in runners.items()} for _ in range(rounds)]
    rows = []
    for precision, activation in itertools.product(PRECISIONS, ACTIVATIONS):
        row: dict[str, Any] = {"network": name, "activation": activation, "precision": precision}
        tvm, tuned, ort = keys = [(activation, precision, label) for label in CONTENDERS]
        row |= facts[tvm] | {"tuning": facts[tuned]["tuning"]}
        row["over_onnxruntime"] = {key[2]: ratios(seconds, key, ort) for key in (tvm, tuned)}
        row["over_relu"] = {key[2]: ratios(seconds, key, ("ReLU", *key[1:])) for key in keys}
        row["ms"] = {key[2]: 1e3 * statistics.median(took[key] for took in seconds) for key in keys}
        rows.append(row)
    return rows


def ratios(seconds: list[dict[Any, float]], over: Any, under: Any) -> dict[str, float]:
    return summary([took[over] / took[under] for took in seconds])


def turn(runner: Any, x: Any) -> float:
    """Seconds of this thread for one run."""
    start = time.thread_time()
    for _ in range(RUNS_PER_TURN):
        runner.run(x)
    return (time.thread_time() - start) / RUNS_PER_TURN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--minutes", type=float, default=2.0, help="of tuning for each model")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as kept:
        for name in asked.networks:
            for row in measure(name, asked.rounds, asked.minutes, Path(kept)):
                rows.append(row)
                if not asked.json:
                    print(line(row), flush=True)
            if asked.report:  # of what is measured so far: the whole takes long
                write_section("tvm_cpu", "TVM against ONNX Runtime", report(rows, asked.rounds, asked.minutes))
    if asked.json:
        print(json.dumps({**vars(asked), "onnxruntime": onnxruntime.__version__, "rows": rows}, indent=1))


def line(row: dict[str, Any]) -> str:
    over_ort, over_relu = (
        ", ".join(f"{label} {spread(ratio)}" for label, ratio in row[over].items())
        for over in ("over_onnxruntime", "over_relu")
    )
    return (
        f"{row['network']:14} {row['precision']} {row['activation']:15} over ONNX Runtime: {over_ort}"
        f"  over ReLU: {over_relu}  {row['kernels']} kernels, compiled in {row['compile_s']:.1f} s"
    )


def report(rows: list[dict[str, Any]], rounds: int, minutes: float) -> str:
    lines = [
        [
            f"{row['network']}, {row['activation']}, {row['precision'].upper()}",
            *(spread(ratio) for ratio in row["over_onnxruntime"].values()),
            *(spread(ratio) for ratio in row["over_relu"].values()),
            str(row["kernels"]),
            f"{row['compile_s']:.1f}",
        ]
        for row in rows
    ]
    version, cpu = rows[0]["version"], rows[0]["providers"][0]
    trials = [row["tuning"]["trials"] for row in rows]
    return (
        f"Latency of TVM {version} over ONNX Runtime {onnxruntime.__version__}, untuned and tuned for up to"
        f" {60 * minutes:g} s ({min(trials)} to {max(trials)} trials, with those kept from other models), batch 1,"
        f" one thread, {SHAPE.height}x{SHAPE.width} pixels, {cpu}; LMA has {SEGMENTS} segments, each runtime runs the"
        f" form that it is fastest in, and INT8 in its own dialect. Median of {rounds} interleaved rounds (10th to"
        f" 90th percentile) at a load average of {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores. The next"
        " three columns are each runtime's own latency over the same network with ReLU.\n\n"
        + table(
            [
                "network",
                "TVM / ORT",
                "tuned / ORT",
                "TVM / its ReLU",
                "tuned / its ReLU",
                "ORT / its ReLU",
                "TVM kernels",
                "TVM compiles, s",
            ],
            lines,
        )
        + "\n\nMade by `benchmarks/tvm_cpu.py`."
    )


if __name__ == "__main__":
    main()
