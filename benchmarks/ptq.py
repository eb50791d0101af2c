"""What INT8 buys in ONNX Runtime: latency of each dialect as a ratio to the same network in fp32.

Networks for 32x32 images with random weights (speed does not depend on them), or the ONNX models that are named; batch
1, CPU. The contenders take turns within a round; a ratio is taken per round, and its median, 10th and 90th percentile
are given. Time is that of the thread, so that a busy machine disturbs less; so it runs with one thread.

    python benchmarks/ptq.py [MODEL.onnx ...] [--rounds 30] [--json] [--report]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from results import spread, summary, table, write_section

from edgekd import activations, export, networks
from edgekd.data import Shape
from edgekd.quantize import account, dialects, ptq

RUNS_PER_TURN = 4
SHAPE = Shape(3, 32, 32)
NETWORKS = {
    "ResNet-20": ("resnet", {"depth": 20}),
    "WRN-16-1": ("wrn", {"depth": 16, "k": 1}),
    "LMA student 3": ("lma_student", {"size": 3}),
}
ACTIVATIONS = {
    "relu": ("relu", {}),
    "lma": ("lma", {}),
    "lma continuous": ("lma", {"continuous": True}),
}
# The dialects, and what each is for.
DIALECTS = {
    "ort_uint8": "ONNX Runtime on x86",
    "ort_int8": "ONNX Runtime on ARM",
    "int8": "TensorRT, TVM",
    "uint8": "zero point 128 alone",
}


def models(folder: Path) -> Iterator[tuple[str, Path]]:
    x = np.zeros((1, SHAPE.channels, SHAPE.height, SHAPE.width), np.float32)
    for title, (name, options) in NETWORKS.items():
        for activation, spec in ACTIVATIONS.items():
            network = networks.build(name, options, SHAPE, 10, spec, 0)
            form = activations.default_form(bool(spec[1].get("continuous")))
            file = folder / f"{name}-{activation}.onnx"
            export.export(network, file, example=x, opset=20, dynamic_batch=False, form=form, metadata={})
            yield f"{title}, {activation}", file


def contenders(file: Path) -> tuple[dict[str, onnx.ModelProto], np.ndarray, int]:
    """The model in fp32 and every dialect, an image, and how many layers the x86 dialect leaves in float."""
    shape = [dimension.dim_value for dimension in onnx.load(file).graph.input[0].type.tensor_type.shape.dim][1:]
    images = np.random.default_rng(0).standard_normal((32, *shape)).astype(np.float32)
    prepared = ptq.prepare(file, images)
    int8 = prepared.quantized("minmax", 100)
    ready = {
        "fp32": prepared.graph.model,
        "ort_uint8": dialects.onnxruntime_from_int8(int8),
        "ort_int8": dialects.onnxruntime_from_int8(int8, activations="int8"),
        "int8": int8,
        "uint8": dialects.uint8_from_int8(int8),
    }
    return ready, images[:1], len(account.still_float(prepared.graph, ready["ort_uint8"]))


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def turn(ready: onnxruntime.InferenceSession, x: np.ndarray) -> float:
    feed = {ready.get_inputs()[0].name: x}
    start = time.thread_time()
    for _ in range(RUNS_PER_TURN):
        ready.run(None, feed)
    return (time.thread_time() - start) / RUNS_PER_TURN


def measure(title: str, file: Path, rounds: int) -> list[dict[str, Any]]:
    ready, x, still_float = contenders(file)
    sessions = {name: session(model) for name, model in ready.items()}
    seconds = [{name: turn(opened, x) for name, opened in sessions.items()} for _ in range(rounds + 2)][2:]
    rows = []
    for name in DIALECTS:
        run_ms = 1e3 * statistics.median(took[name] for took in seconds)
        fp32_ms = 1e3 * statistics.median(took["fp32"] for took in seconds)
        row = {"model": title, "dialect": name, "run_ms": run_ms, "fp32_ms": fp32_ms, "still_float": still_float}
        rows.append(row | summary([took[name] / took["fp32"] for took in seconds]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", metavar="MODEL.onnx")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        named = [(file.name, file) for file in asked.models]
        for title, file in named or models(Path(folder)):
            found = measure(title, file, asked.rounds)
            rows += found
            if not asked.json:
                print(f"{title} ({found[0]['fp32_ms']:.2f} ms in fp32)", flush=True)
                for row in found:
                    print(f"  {row['dialect']:10} {spread(row)}  {row['run_ms']:6.2f} ms", flush=True)
    if asked.json:
        print(json.dumps({"rounds": asked.rounds, "onnxruntime": onnxruntime.__version__, "rows": rows}, indent=1))
    if asked.report:
        write_section("ptq", "What INT8 buys in ONNX Runtime", report(rows, asked.rounds))


def report(rows: list[dict[str, Any]], rounds: int) -> str:
    titles = dict.fromkeys(row["model"] for row in rows)
    cell = {(row["model"], row["dialect"]): spread(row) for row in rows}
    header = ["model", *(f"`{name}`: {purpose}" for name, purpose in DIALECTS.items())]
    return (
        f"Batch 1, 1 thread, ONNX Runtime {onnxruntime.__version__}, CPU: latency in INT8 over the same network in"
        f" fp32, median of {rounds} interleaved rounds (10th to 90th percentile).\n\n"
        + table(header, [[title, *(cell[title, name] for name in DIALECTS)] for title in titles])
        + "\n\nMade by `benchmarks/ptq.py`."
    )


if __name__ == "__main__":
    main()
