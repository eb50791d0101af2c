"""What LMA costs at inference in ONNX Runtime in each of its ONNX forms, as a ratio to the same network with ReLU.

Six 3x3 convolutions of 32 channels on a 32x32 map, each followed by the activation, batch 1, CPU. ONNX Runtime fuses
the ReLU into the convolution, so the ratio charges LMA in full. The contenders take turns within a round; a ratio is
taken per round, and its median, 10th and 90th percentile are given.

    python benchmarks/lma_onnx.py [--k 4 8] [--rounds 30] [--threads 1] [--json] [--report]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from typing import Any

import onnxruntime
import torch
from results import spread, summary, table, write_section
from torch import nn

from edgekd import registry
from edgekd.activations import FORMS, add_function, frozen, multi_segment_layers

RUNS_PER_TURN = 8
LAYERS, CHANNELS, SIZE = 6, 32, 32


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
    return built


def session(model: nn.Module, threads: int) -> onnxruntime.InferenceSession:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.zeros(1, CHANNELS, SIZE, SIZE)
        exported = torch.onnx.export(
            model.eval(), (x,), dynamo=True, opset_version=20, verbose=False, input_names=["x"]
        )
    proto = exported.model_proto
    add_function(proto)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure(ks: list[int], rounds: int, threads: int) -> list[dict[str, Any]]:
    x = torch.randn(1, CHANNELS, SIZE, SIZE).numpy()
    rows = []
    for k in ks:
        sessions = {"relu": session(network("relu"), threads)}
        for name, form in FORMS.items():
            lma = network("lma", k=k, continuous=form.exact_for == "continuous")
            sessions[name] = session(frozen(lma, name), threads)
        seconds = [{name: turn(ready, x) for name, ready in sessions.items()} for _ in range(rounds + 1)][1:]
        for name in sessions:
            ratios = [took[name] / took["relu"] for took in seconds]
            exact_for = FORMS[name].exact_for if name in FORMS else ""
            run_ms = 1e3 * statistics.median(took[name] for took in seconds)
            rows.append({"k": k, "form": name, "exact_for": exact_for, "run_ms": run_ms} | summary(ratios))
    return rows


def turn(ready: onnxruntime.InferenceSession, x: Any) -> float:
    feed = {ready.get_inputs()[0].name: x}
    start = time.perf_counter()
    for _ in range(RUNS_PER_TURN):
        ready.run(None, feed)
    return (time.perf_counter() - start) / RUNS_PER_TURN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    asked = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    rows = measure(asked.k, asked.rounds, asked.threads)
    if asked.json:
        print(json.dumps({**vars(asked), "onnxruntime": onnxruntime.__version__, "rows": rows}, indent=1))
        return
    print(f"ONNX Runtime {onnxruntime.__version__}, {asked.threads} thread(s), {asked.rounds} rounds")
    for row in rows:
        print(f"k={row['k']:<3} {row['form']:12} {row['exact_for']:11} {spread(row)}  {row['run_ms']:6.2f} ms")
    if asked.report:
        write_section("lma_onnx", "What LMA costs in ONNX Runtime", report(rows, asked))


def report(rows: list[dict[str, Any]], asked: argparse.Namespace) -> str:
    cell = {(row["form"], row["k"]): spread(row) for row in rows}
    lines = [[f"`{name}`", form.exact_for, *(cell[name, k] for k in asked.k)] for name, form in FORMS.items()]
    return (
        f"Six convolutions of {CHANNELS} channels at {SIZE}x{SIZE}, batch 1, {asked.threads} thread(s), ONNX Runtime"
        f" {onnxruntime.__version__}: latency over the same network with ReLU, median of {asked.rounds}"
        " interleaved rounds (10th to 90th percentile).\n\n"
        + table(["form", "exact for", *(f"k = {k}" for k in asked.k)], lines)
        + "\n\nMade by `benchmarks/lma_onnx.py`."
    )


if __name__ == "__main__":
    main()
