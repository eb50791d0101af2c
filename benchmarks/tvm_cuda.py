"""TVM on an NVIDIA GPU against ONNX Runtime's CUDA provider and torch.compile: right, and how fast, ReLU and LMA.

Batch 1, fp32, 3x32x32. Every contender takes an image from the host's memory and gives logits back there. They take
turns within a round; a ratio is taken per round, and its median, 10th and 90th percentile given. Needs a GPU, and nvcc
to compile for it; ONNX Runtime is compared where it has its CUDA provider (pip install onnxruntime-gpu).

    python benchmarks/tvm_cuda.py [--rounds 40] [--networks "ResNet-20" ...] [--json] [--report]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from results import spread, summary, table, write_section
from tvm_cpu import ACTIVATIONS, IMAGE, NETWORKS, SEGMENTS, engine, network

from edgekd import registry
from edgekd.backends.tvm.runner import EngineError, gpu_here
from edgekd.export import export

RUNS_PER_TURN, IMAGES = 20, 64
TVM, ORT, TORCH = "TVM", "ONNX Runtime", "torch.compile"
Run = Callable[[Any], Any]


def contenders(name: str, activation: str, gpu: str, folder: Path) -> tuple[dict[str, Run], dict[str, Any]]:
    """What answers images of one network on the GPU, and what TVM said of its engine with its error to the CPU."""
    made = network(name, activation)
    runs: dict[str, Run] = {}
    about: dict[str, Any] = {}
    backends = {TVM: registry.create("backend", "tvm", options={"gpu": gpu})}
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        backends[ORT] = registry.create("backend", "onnxruntime", options={"providers": ["CUDAExecutionProvider"]})
    for label, backend in backends.items():
        form = backend.forms["continuous" if "continuous" in activation else "any"]
        model = folder / f"{activation} {label}.onnx"
        example = np.zeros((1, *IMAGE), np.float32)
        export(made, model, example=example, opset=20, dynamic_batch=False, form=form, metadata={})
        runner, facts = engine(model, backend, "engine")
        runs[label] = runner.run
        if label == TVM:
            about = facts | {"error": error(runner, made)} | runner.facts
    compiled = torch.compile(made.cuda())

    def run(x: Any) -> Any:
        with torch.no_grad():
            return compiled(torch.from_numpy(x).cuda()).cpu().numpy()

    return runs | {TORCH: run}, about


def error(runner: Any, made: torch.nn.Module) -> float:
    """The root mean square difference to torch on the CPU, in units of the logits'."""
    x = np.random.default_rng(2).standard_normal((IMAGES, *IMAGE)).astype(np.float32)
    with torch.no_grad():
        expected = made(torch.from_numpy(x)).numpy()
    got = np.concatenate([runner.run(x[at : at + 1]) for at in range(IMAGES)])
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def measure(name: str, gpu: str, rounds: int) -> list[dict[str, Any]]:
    """A row for every activation."""
    x = np.random.default_rng(0).standard_normal((1, *IMAGE)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        runs, facts = {}, {}
        for activation in ACTIVATIONS:
            made, facts[activation] = contenders(name, activation, gpu, Path(folder))
            runs |= {(activation, label): run for label, run in made.items()}
        for run in runs.values():
            turn(run, x)
        seconds = [{key: turn(run, x) for key, run in runs.items()} for _ in range(rounds)]
    rows = []
    for activation in ACTIVATIONS:
        row = {"network": name, "activation": activation} | facts[activation]
        row["over"] = {
            label: summary([took[activation, TVM] / took[activation, label] for took in seconds])
            for label in (ORT, TORCH)
            if (activation, label) in runs
        }
        row["over_relu"] = summary([took[activation, TVM] / took["ReLU", TVM] for took in seconds])
        rows.append(row)
    return rows


def turn(run: Run, x: Any) -> float:
    """Seconds of one run; each ends with its logits in the host's memory."""
    start = time.perf_counter()
    for _ in range(RUNS_PER_TURN):
        run(x)
    return (time.perf_counter() - start) / RUNS_PER_TURN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    asked = parser.parse_args()
    try:
        gpu, _ = gpu_here()
    except EngineError as reason:
        raise SystemExit(f"nothing is measured and nothing written: {reason}") from None
    rows = [row for name in asked.networks for row in measure(name, gpu, asked.rounds)]
    if asked.json:
        print(json.dumps({**vars(asked), "rows": rows}, indent=1))
    else:
        print(report(rows, asked.rounds))
    if asked.report:
        write_section("tvm_cuda", "TVM on a GPU", report(rows, asked.rounds))


def report(rows: list[dict[str, Any]], rounds: int) -> str:
    lines = [
        [
            f"{row['network']}, {row['activation']}",
            *(spread(row["over"][label]) if label in row["over"] else "not installed" for label in (ORT, TORCH)),
            spread(row["over_relu"]),
            f"{row['parts_ms']['compute']:.3f}",
            str(row["kernels"]),
            f"{row['error']:.0e}",
        ]
        for row in rows
    ]
    head = ["network", f"TVM / {ORT}", f"TVM / {TORCH}", "TVM / its ReLU", "TVM kernels, ms", "kernels", "error"]
    return (
        f"{rows[0]['device']} ({rows[0]['providers'][0]}), TVM {rows[0]['version']}, ONNX Runtime"
        f" {onnxruntime.__version__}, torch {torch.__version__}: latency of one image in fp32 from the host's memory to"
        f" the logits there; LMA has {SEGMENTS} segments. Median of {rounds} interleaved rounds (10th to 90th"
        " percentile). The others may round to TF32, TVM does not. Error: TVM's root mean square difference to torch on"
        " the CPU, over the logits'.\n\n" + table(head, lines) + "\n\nMade by `benchmarks/tvm_cuda.py`."
    )


if __name__ == "__main__":
    main()
