"""Adaptation to a shifted domain on the digits: the student's accuracy where it has seen no label.

    PYTHONPATH=benchmarks:benchmarks/methods python benchmarks/methods/domain.py [--seeds 0 1 2] > FILE
    PYTHONPATH=benchmarks:benchmarks/methods python benchmarks/methods/domain.py --report FILE [FILE ...]

The target domain is made of the other half of the digits, by a stated rule: see `shifted`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from every_method import STUDENT, TEACHER, TEACHER_BUDGET, fit, network, train
from results import gain, spread_of, table, write_section
from torch import Tensor, nn

from edgekd import data, distill
from edgekd.data import Dataset, Split
from edgekd.methods import Method, Setting, Step
from edgekd.methods.domain_kd import discrepancy
from edgekd.methods.features import pooled
from edgekd.methods.taps import Taps, default_taps
from edgekd.recipe import Train

EPOCHS = 10
BUDGET = Train(epochs=EPOCHS, batch_size=32, lr=0.02, keep="last", clip=5.0)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "scratch, source only": ("scratch", {}),
    "kd, source only": ("kd", {}),
    "domain_kd, teacher not adapted": ("domain_kd", {"teacher_lr": 0.0}),
    "domain_kd": ("domain_kd", {}),
    "domain_kd, teacher_lr 0.01": ("domain_kd", {"teacher_lr": 0.01}),
}
IN_TURN = "kd, then adaptation of the student"


class Adaptation(Method):
    """Cross-entropy on the source, and features of both domains that cannot be told apart: no distillation.

    gamma MMD as in domain_kd, gamma = 2 / (1 + exp(-10 progress)) - 1, of the student's own features.
    """

    needs_teacher, needs_target = False, True

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        self.student_taps = Taps(student, default_taps(student, "embedding", "student")[:1], "student")
        self.student_taps.probe(student, setting.example)

    def forward(self, step: Step) -> dict[str, Tensor]:
        (source,) = step.student_features.values()
        with self.student_taps.recording() as seen:
            step.student(step.target)
        (target,) = seen.values()
        gamma = 2 / (1 + math.exp(-10 * step.progress)) - 1
        return {"ce": step.label_loss(), "mmd": gamma * discrepancy(pooled(source), pooled(target))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", type=Path, nargs="+", help="what runs have printed: write docs/results.md from it")
    given = parser.parse_args()
    if given.report:
        lines = [json.loads(line) for file in given.report for line in file.read_text(encoding="utf-8").splitlines()]
        write_section("methods_domain", "Another domain", report(lines))
        return
    for seed in given.seeds:
        run(seed)


def run(seed: int) -> None:
    dataset = domains()
    teacher = network(TEACHER, dataset, seed)
    train(teacher, dataset, TEACHER_BUDGET, "scratch", {}, None, seed)
    print(json.dumps({"seed": seed, "row": "teacher, source only", **measured(teacher, dataset)}), flush=True)
    for row, (method, options) in ROWS.items():
        student = network(STUDENT, dataset, seed)
        train(student, dataset, BUDGET, method, options, teacher, seed)
        print(json.dumps({"seed": seed, "row": row, **measured(student, dataset)}), flush=True)
    student, half = network(STUDENT, dataset, seed), BUDGET.model_copy(update={"epochs": EPOCHS // 2})
    train(student, dataset, half, "kd", {}, teacher, seed)
    fit(student, dataset, half, Adaptation(), None, seed)
    print(json.dumps({"seed": seed, "row": IN_TURN, **measured(student, dataset)}), flush=True)


def domains() -> Dataset:
    """Half of the training images as the source; the others and the test images, shifted, as the target."""
    dataset = data.load("digits", {})
    half = np.arange(len(dataset.train)) % 2 == 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "target.npz")
        others, test = dataset.train[np.flatnonzero(~half)], dataset.test
        np.savez(
            file, x_train=shifted(others.images, 0), y_train=others.labels, x_test=shifted(test.images, 1),
            y_test=test.labels,
        )  # fmt: skip
        return data.with_target(replace(dataset, train=dataset.train[np.flatnonzero(half)]), "npz", {"path": str(file)})


def shifted(images: np.ndarray, seed: int) -> np.ndarray:
    """Less contrast on a brighter ground, moved by a pixel, with noise: 90 + 0.5 x + N(0, 25), in 0..255."""
    noise = np.random.default_rng(seed).normal(0, 25, images.shape)
    moved = np.roll(images.astype(float), (1, 1), (2, 3))
    return np.clip(90 + 0.5 * moved + noise, 0, 255).round().astype(np.uint8)


def measured(student: nn.Module, dataset: Dataset) -> dict[str, float]:
    """Accuracy in percent, on the test images of the source and of the target."""

    def accuracy(split: Split) -> float:
        return 100 * float((distill.predict(student, split, dataset).argmax(1) == split.labels).mean())

    assert dataset.target is not None
    return {"source": accuracy(dataset.test), "target": accuracy(dataset.target.test)}


def report(lines: list[dict[str, Any]]) -> str:
    found = {(line["row"], line["seed"]): line for line in lines}
    seeds = sorted({line["seed"] for line in lines})
    rows, base = [], [found["kd, source only", seed]["target"] for seed in seeds]
    for name in ("teacher, source only", *ROWS, IN_TURN):
        values = {key: [found[name, seed][key] for seed in seeds] for key in ("source", "target")}
        shown = [spread_of(one, 1) for one in values.values()]
        rows.append(
            [name, *shown, "" if name in ("teacher, source only", "kd, source only") else gain(values["target"], base)]
        )
    return (
        f"Test accuracy in percent, mean ± standard deviation over {len(seeds)} seeds. Source: half of the digits'"
        " training images, labelled. Target: the other half, without labels, and the test images, moved by a pixel down"
        " and right, 90 + 0.5 x + N(0, 25). The student, a ResNet-8 of half the width, is trained for"
        f" {EPOCHS} epochs; the teacher, a ResNet-14, on the source alone. In turn: half of the epochs kd on the"
        " source, the others cross-entropy there and the discrepancy of the student's features. Gains are differences"
        " within seeds, mean (range).\n\n"
        + table(["method", "on the source", "on the target", "over kd, on the target"], rows)
        + f"\n\n{joint(found, seeds)}"
        + "\n\nMade by `benchmarks/methods/domain.py`."
    )


def joint(found: dict[tuple[str, int], dict[str, Any]], seeds: list[int]) -> str:
    """In words, whether learning both at once is above one after the other, on the target."""
    change = statistics.mean(found["domain_kd", seed]["target"] - found[IN_TURN, seed]["target"] for seed in seeds)
    return f"`domain_kd` is {'above' if change > 0 else 'not above'} `{IN_TURN}` on the target ({change:+.1f} points)."


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
