"""What quantization costs on CIFAR-10: accuracy, size and ONNX Runtime latency, ReLU against LMA, method by method.

    python benchmarks/quantization.py --data FOLDER --teacher teacher.safetensors [--seeds 0 1 2] [--report]

Students are distilled from the LMA paper's teacher (one trained before), then quantized: `ptq` as it is, the others
after a short finetuning under the same distillation. Runs that the store holds are not repeated, so the script can be
stopped and started. `--report` measures latency, the contenders in turn, and writes the table into docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from ptq import session, turn
from results import gain, spread, spread_of, summary, table, write_section

from edgekd import pipeline, recipe, registry, stages, target
from edgekd.artifact import Artifact, Store
from edgekd.quantize import dialects
from edgekd.stages import Job

RECIPE = """\
name: quantization
data:
  source: parquet
  train_limit: 20000
  normalize: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
  augment: {crop: 4, flip: true}
teacher: {network: lma_teacher}
student: {network: lma_student}
distill:
  method: kd
  kd_weight: 0.7
  temperature: 2.0
  scratch: false
  cache_teacher: true
  train:
    {epochs: 10, batch_size: 64, lr: 0.02, momentum: 0.9, nesterov: true, weight_decay: 2.2e-4, schedule: cosine,
     channels_last: true}
"""
# Epochs of distillation and of finetuning: what a CPU can do in an hour or two.
STUDENTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "LMA student 3": ({"network": "lma_student", "size": 3}, 10, 2),
    "ResNet-20": ({"network": "resnet", "depth": 20}, 5, 1),
}
ACTIVATIONS = {
    "ReLU": "relu",
    "LMA-8": "{lma: {k: 8}}",
    "LMA-8 continuous": "{lma: {k: 8, continuous: true}}",
}
# The continuous form is compared on the student that the paper quantizes.
ONLY = {("ResNet-20", "LMA-8 continuous")}
METHODS = {
    "PTQ INT8": "ptq",
    "QAT INT8": "qat",
    "Polino 8 bit": "quantized_distillation, bits: 8",
    "Polino 4 bit": "quantized_distillation, bits: 4",
}
LR = 0.005
SESSIONS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with CIFAR-10 as train.parquet and test.parquet")
    parser.add_argument("--teacher", required=True, help="the paper's teacher, as benchmarks/lma_cifar10.py trains it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--store", type=Path, default=Path(".edgekd"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    rows = []
    for seed in given.seeds:
        for student in given.students:
            for activation in ACTIVATIONS:
                if (student, activation) in ONLY:
                    continue
                for method in given.methods:
                    started = time.monotonic()
                    row = measured(given, seed, student, activation, method)
                    seconds = round(time.monotonic() - started)
                    rows.append(row)
                    shown = {key: value for key, value in row.items() if key != "artifacts"}
                    print(json.dumps(shown | {"seconds": seconds}), flush=True)
    if given.report:
        write_section("quantization", "CIFAR-10: what quantization costs, ReLU against LMA", report(rows, given))


def job(given: argparse.Namespace, seed: int, student: str, activation: str, method: str) -> Job:
    """One student, one way of quantizing it."""
    options, epochs, finetuned = STUDENTS[student]
    quantize = f"{{method: {METHODS[method]}" + ("}" if method == "PTQ INT8" else f", epochs: {finetuned}, lr: {LR}}}")
    overrides = [
        f"seed={seed}", f"data.path={given.data}", f"teacher.checkpoint={given.teacher}",
        *(f"student.{key}={value}" for key, value in options.items()), f"student.activation={ACTIVATIONS[activation]}",
        f"distill.train.epochs={epochs}", f"quantize={quantize}",
    ]  # fmt: skip
    return Job(
        recipe.parse(RECIPE, overrides=overrides), target.load("local"), Store(given.store),
        run_id=f"quantization-{seed}", created="", command="python benchmarks/quantization.py",
    )  # fmt: skip


def measured(given: argparse.Namespace, seed: int, student: str, activation: str, method: str) -> dict[str, Any]:
    """One quantized student: accuracy in percent before and after, sizes, and its artifacts."""
    made = pipeline.run(job(given, seed, student, activation, method), "quantize")
    result = made["quantize"].result
    return {
        "seed": seed, "student": student, "activation": activation, "method": method,
        "float": 100 * made["student"].result["score"], "score": 100 * result["score"],
        "float_bytes": result["size"]["float_bytes"], "bytes": result["size"]["bytes"],
        "still_float": result["still_float"], "agreement": (result["agreement"] or {}).get("agreement"),
        "artifacts": made,
    }  # fmt: skip


def latency(made: dict[str, Artifact], rounds: int) -> dict[str, float]:
    """The quantized model over the float one, in ONNX Runtime, batch 1, in turn."""
    backend = registry.create("backend", "onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        quantized = Path(folder) / "quantized.onnx"
        onnx.save(dialects.translated(onnx.load(made["quantize"].file(stages.MODEL)), backend.dialect), quantized)
        models = []
        for model in (made["onnx-student"].file(stages.MODEL), quantized):
            backend.compile(model, Path(folder), threads=1)
            models.append(onnx.load(Path(folder) / "model.onnx"))
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    ratios = []
    for _ in range(SESSIONS):  # where a session's memory happens to lie decides much of its speed
        opened = [session(model) for model in models]
        seconds = [[turn(one, x) for one in opened] for _ in range(rounds // SESSIONS + 2)][2:]
        ratios += [after / before for before, after in seconds]
    return summary(ratios)


def report(rows: list[dict[str, Any]], given: argparse.Namespace) -> str:
    lines = []
    for student in given.students:
        for activation in ACTIVATIONS:
            own = [row for row in rows if (row["student"], row["activation"]) == (student, activation)]
            if not own:
                continue
            name = f"{student}, {activation}"
            floats = [row["float"] for row in own if row["method"] == given.methods[0]]
            lines.append([f"{name}, fp32", spread_of(floats), "", f"{own[0]['float_bytes'] / 1e3:.0f}", "1"])
            for method in given.methods:
                runs = [row for row in own if row["method"] == method]
                scores = [row["score"] for row in runs]
                change = gain(scores, [row["float"] for row in runs])
                ratio = spread(latency(runs[0]["artifacts"], given.rounds))
                size = f"{runs[0]['bytes'] / 1e3:.0f}"
                lines.append([f"{name}, {method}", spread_of(scores), change, size, ratio])
    agreements = [row["agreement"] for row in rows if row["agreement"] is not None]
    in_float = sorted({f"{row['student']} {row['activation']}: {name}" for row in rows for name in row["still_float"]})
    settings = "; ".join(
        f"{name}: {epochs} epochs of distillation, {finetuned} of finetuning"
        for name, (_, epochs, finetuned) in STUDENTS.items()
    )
    return (
        f"Test accuracy in percent, mean ± standard deviation over {len(given.seeds)} seeds, and the change against the"
        " same student in fp32, seed by seed (mean, smallest to largest). Teacher: the LMA paper's, 18,000 training"
        f" images, {settings}, lr {LR}. Size in kB of the ONNX file as ONNX Runtime gets it. Latency: over fp32, ONNX"
        f" Runtime {onnxruntime.__version__}, batch 1, 1 thread, median of {given.rounds} interleaved rounds in"
        f" {SESSIONS} sessions (10th to 90th percentile); Polino quantizes weights alone, which are unpacked when the"
        " model is loaded.\n\n"
        + table(["student", "accuracy", "change", "kB", "latency over fp32"], lines)
        + "\n\nOver all trained models, the deployed graph and the network that was trained agree in top-1 on"
        f" {100 * min(agreements):.2f} % to {100 * max(agreements):.2f} % of the test images. Layers that ONNX Runtime"
        f" computes in float in an INT8 model: {', '.join(in_float) or 'none'}."
        + "\n\nMade by `benchmarks/quantization.py`."
    )


if __name__ == "__main__":
    main()
