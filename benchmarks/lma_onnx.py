"""What LMA costs at inference in each of its ONNX forms, as a ratio to the same network with ReLU in the same runtime.

Six 3x3 convolutions of 32 channels on a 32x32 map, each followed by the activation, batch 1, CPU. The runtimes fuse the
ReLU into the convolution, so the ratio charges LMA in full. The contenders take turns within a round and are timed by
the process's own clock, which other programs disturb less than the wall's; a ratio is taken per round, and its median,
10th and 90th percentile are given.

    python benchmarks/lma_onnx.py [--backends onnxruntime ...] [--k 4 8] [--rounds 30] [--json] [--report]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import spread, summary, table, write_section
from torch import nn

from edgekd import registry
from edgekd.activations import FORMS, multi_segment_layers
from edgekd.backends import Engine, load_runner
from edgekd.export import export

RUNS_PER_TURN = 8
LAYERS, CHANNELS, SIZE = 6, 32, 32
BACKENDS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tvm": "TVM"}
RELU = "relu"


def network(activation: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
            registry.create("activation", activation, CHANNELS, options=options),
        ]
    built = nn.Sequential(*layers)
    for _, layer in multi_segment_layers(built):
        nn.init.normal_(layer.slope_deltas, 0, 0.3)
        nn.init.normal_(layer.biases, 0, 0.1)
    return built.eval()


def runner(backend: str, model: Path) -> Any:
    """The model as the backend runs it, or None for one that it cannot compile."""
    made = registry.create("backend", backend)
    if made.check(model):
        return None
    folder = model.with_suffix(f".{backend}")
    folder.mkdir()
    made.compile(model, folder, threads=1)
    return load_runner(Engine("benchmark", folder, made.runner, backend))


def models(k: int, folder: Path) -> dict[str, Path]:
    """The network with ReLU, and with LMA in each form."""
    x, files = np.zeros((1, CHANNELS, SIZE, SIZE), np.float32), {}
    for name in (RELU, *FORMS):
        files[name] = folder / f"{name}.onnx"
        continuous = name != RELU and FORMS[name].exact_for == "continuous"
        made = network(RELU) if name == RELU else network("lma", k=k, continuous=continuous)
        form = "where" if name == RELU else name
        export(made, files[name], example=x, opset=20, dynamic_batch=False, form=form, metadata={})
    return files


def measure(k: int, backends: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for every form in every backend."""
    x = np.random.default_rng(0).standard_normal((1, CHANNELS, SIZE, SIZE)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        files = models(k, Path(folder))
        for backend in backends:
            runners = {name: runner(backend, file) for name, file in files.items()}
            ready = {name: made for name, made in runners.items() if made is not None}
            seconds = [{name: turn(made, x) for name, made in ready.items()} for _ in range(rounds + 1)][1:]
            for name in FORMS:
                ratios = [took[name] / took[RELU] for took in seconds] if name in ready else None
                yield {"backend": backend, "k": k, "form": name, "over_relu": summary(ratios) if ratios else None}


def turn(made: Any, x: Any) -> float:
    """Seconds of this process for one run; some runtimes compute in a thread of their own."""
    start = time.process_time()
    for _ in range(RUNS_PER_TURN):
        made.run(x)
    return (time.process_time() - start) / RUNS_PER_TURN


def cell(row: dict[str, Any]) -> str:
    return spread(row["over_relu"]) if row["over_relu"] else "not compiled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    asked = parser.parse_args()
    rows = []
    for row in itertools.chain.from_iterable(measure(k, asked.backends, asked.rounds) for k in asked.k):
        rows.append(row)
        if not asked.json:
            of = f"{row['backend']:12} k={row['k']:<3} {row['form']:12} {FORMS[row['form']].exact_for:11}"
            print(f"{of} {cell(row)}", flush=True)
    if asked.json:
        print(json.dumps({**vars(asked), "rows": rows}, indent=1))
    if asked.report:
        write_section("lma_onnx", "What LMA costs in each runtime", report(rows, asked))


def report(rows: list[dict[str, Any]], asked: argparse.Namespace) -> str:
    cells = {(row["backend"], row["k"], row["form"]): cell(row) for row in rows}
    columns = list(itertools.product(asked.backends, asked.k))
    lines = [
        [f"`{name}`", form.exact_for, *(cells[*column, name] for column in columns)] for name, form in FORMS.items()
    ]
    return (
        f"Six convolutions of {CHANNELS} channels at {SIZE}x{SIZE}, batch 1, one thread: processor time over the same"
        f" network with ReLU in the same runtime, median of {asked.rounds} interleaved rounds (10th to 90th"
        f" percentile), at a load average of {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores.\n\n"
        + table(["form", "exact for", *(f"{BACKENDS[backend]}, k = {k}" for backend, k in columns)], lines)
        + "\n\nMade by `benchmarks/lma_onnx.py`."
    )


if __name__ == "__main__":
    main()
