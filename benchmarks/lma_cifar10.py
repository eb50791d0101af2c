"""The LMA paper's comparison on CIFAR-10 (Xu et al., AAAI 2020, table 3, student 3), on the budget of a CPU.

    python benchmarks/lma_cifar10.py --data FOLDER [--teacher teacher.safetensors] [--seeds 0 1 2] [--report]

Every student of a seed starts from the same weights, sees the same batches and learns from the same teacher; only the
activation differs. Runs that the store holds are not repeated, so the script can be stopped and started, and several
can share the work (give each its own seeds). `--report` writes the table into docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from results import gain, spread_of, table, write_section

from edgekd import pipeline, recipe, target
from edgekd.artifact import Store
from edgekd.stages import Job

VARIANTS = {
    "ReLU, no teacher": ("scratch", "relu"),
    "ReLU": ("student", "relu"),
    "PReLU": ("student", "prelu"),
    "Swish": ("student", "swish"),
    "APLU-8": ("student", "{aplu: {k: 8}}"),
    "LMA-8": ("student", "{lma: {k: 8}}"),
    "LMA-8 continuous": ("student", "{lma: {k: 8, continuous: true}}"),
}
# The paper's student 3 at full length (200 epochs of 50,000 images, five seeds), for comparison.
PAPER = {"ReLU": "73.33 ± 0.79", "PReLU": "75.30 ± 0.17", "Swish": "75.45 ± 0.34", "APLU-8": "77.54 ± 0.97",
         "LMA-8": "77.66 ± 0.47"}  # fmt: skip
STUDENT = "{{epochs: {epochs}, batch_size: 64, lr: 0.02, weight_decay: 2.2e-4, schedule: cosine, channels_last: true}}"
TEACHER = (
    "{{epochs: {epochs}, batch_size: 64, lr: 0.02, weight_decay: 2.2e-4, schedule: cosine, channels_last: true,"
    " precision: bf16}}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with CIFAR-10 as train.parquet and test.parquet")
    parser.add_argument("--teacher", help="trained before; default: train it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=20_000, help="training images, of which a tenth validates")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--store", type=Path, default=Path(".edgekd"))
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    teacher = given.teacher or pipeline.run(job(given, 0, "relu"), "teacher")["teacher"].file("weights.safetensors")
    for seed in given.seeds:
        for name, (stage, activation) in VARIANTS.items():
            started = time.monotonic()
            artifacts = pipeline.run(job(given, seed, activation, teacher, scratch=stage == "scratch"), "student")
            found[name].append(100 * artifacts[stage].result["score"])
            seconds = round(time.monotonic() - started)
            print(json.dumps({"seed": seed, "variant": name, "score": found[name][-1], "seconds": seconds}), flush=True)
    if given.report:
        body = report(given, found, 100 * artifacts["teacher"].result["score"])
        write_section("lma_cifar10", "CIFAR-10: activations of the LMA paper's student 3", body)


def job(
    given: argparse.Namespace, seed: int, activation: str, teacher: str | Path | None = None, *, scratch: bool = False
) -> Job:
    overrides = [
        f"seed={seed}", f"data.path={given.data}", f"data.train_limit={given.images}",
        f"student.activation={activation}", f"distill.scratch={str(scratch).lower()}", "distill.cache_teacher=true",
        f"teacher.train={TEACHER.format(epochs=given.epochs)}", f"distill.train={STUDENT.format(epochs=given.epochs)}",
        *([f"teacher.checkpoint={teacher}"] if teacher else []),
    ]  # fmt: skip
    return Job(
        recipe.load("cifar10-lma", overrides), target.load("local"), Store(given.store),
        run_id=f"lma-cifar10-{seed}", created="", command="python benchmarks/lma_cifar10.py",
    )  # fmt: skip


def report(given: argparse.Namespace, found: dict[str, list[float]], teacher: float) -> str:
    relu = found["ReLU"]
    rows = []
    for name, values in found.items():
        rows.append([name, spread_of(values), "" if name == "ReLU" else gain(values, relu), PAPER.get(name, "")])
    return (
        f"Test accuracy in percent, mean ± standard deviation over {len(given.seeds)} seeds; data split and teacher are"
        f" the same for all. Teacher: the paper's, trained here, {teacher:.2f}. Budget: {given.images:,} training"
        f" images, of which a tenth validates, {given.epochs} epochs, SGD lr 0.02 cosine, batch 64, KD weight 0.7,"
        " temperature 2; the paper's column is 200 epochs of 50,000 images with a teacher of 92.83.\n\n"
        + table(["activation", "accuracy", "over ReLU, per seed (range)", "paper"], rows)
        + "\n\nMade by `benchmarks/lma_cifar10.py`."
    )


if __name__ == "__main__":
    main()
