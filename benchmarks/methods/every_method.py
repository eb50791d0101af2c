"""Every distillation method on the digits, at equal budget: few labelled images, a teacher that has seen many.

    PYTHONPATH=benchmarks python benchmarks/methods/every_method.py [--seeds 0 1 2] [--only kd rkd] > FILE
    PYTHONPATH=benchmarks python benchmarks/methods/every_method.py --report FILE [FILE ...]

Teacher, student's first weights, batches and test images of a seed are the same for all methods; every method has the
defaults of its options unless its row says otherwise. Seeds may run side by side, each into a file of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from results import gain, spread_of, table, write_section
from torch import nn

from edgekd import data, distill, networks, registry
from edgekd.data import Dataset
from edgekd.methods import Method
from edgekd.recipe import Augment, Train

# What a row of the table is, besides every registered method with its defaults.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "kd, kd_weight 0.9 to 0.1": ("kd", {"kd_weight": {"linear": [0.9, 0.1]}}),
    "kd, temperature 8 to 1": ("kd", {"temperature": {"linear": [8.0, 1.0]}}),
    "kd, where the teacher is right": ("kd", {"selective": "right"}),
    "kd, where the teacher is sure": ("kd", {"selective": "sure"}),
    "attention, weight 30": ("attention", {"weight": 30.0}),
    "combined: kd, rkd": ("combined", {"methods": ["kd", "rkd"]}),
    "staged: fitnet 10, kd 20": ("staged", {"methods": [{"fitnet": {"ce_weight": 0.0}}, "kd"], "epochs": [10, 20]}),
}
FIRST = {"teacher": 0, "scratch": 1, "kd": 2}  # rows of the table; the others follow by name
IMAGES, EPOCHS = 200, 30
BUDGET = Train(epochs=EPOCHS, batch_size=32, lr=0.05, keep="last")
TEACHER_BUDGET = Train(epochs=12, batch_size=64, lr=0.1, keep="last")
AUGMENT = Augment(crop=1)
STUDENT, TEACHER = {"depth": 8, "width": 0.5}, {"depth": 14, "width": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="rows to run; default: all")
    parser.add_argument("--report", type=Path, nargs="+", help="what runs have printed: write docs/results.md from it")
    given = parser.parse_args()
    if given.report:
        lines = [line for file in given.report for line in file.read_text(encoding="utf-8").splitlines()]
        write_section(
            "methods_every_method", "Distillation methods on the digits", report([json.loads(one) for one in lines])
        )
        return
    for seed in given.seeds:
        run(seed, given.only)


def run(seed: int, only: list[str] | None) -> None:
    """Train a teacher and every student, and print a line of JSON for each."""
    rows = {name: (name, {}) for name in registry.names("method") if not _needs_more(name)} | VARIANTS
    many, few = data.load("digits", {}), data.load("digits", {}, train_limit=IMAGES)
    teacher = network(TEACHER, many, seed)
    seconds = train(teacher, many, TEACHER_BUDGET, "scratch", {}, None, seed)
    found = {"seed": seed, "images": len(few.test)}
    print(json.dumps({**found, "row": "teacher", "score": accuracy(teacher, many), "seconds": seconds}), flush=True)
    for row, (method, options) in rows.items():
        if not only or row in only:
            student = network(STUDENT, few, seed)
            seconds = train(student, few, BUDGET, method, options, teacher, seed)
            print(json.dumps({**found, "row": row, "score": accuracy(student, few), "seconds": seconds}), flush=True)


def _needs_more(name: str) -> bool:
    """Options, another task, data of another domain, or a student of its own (see tasks.py, domain.py, boards.py)."""
    entry = registry.entry("method", name)
    required, made = any(option.required for option in entry.options.values()), entry.load()
    other = made.tasks is not None and "classification" not in made.tasks
    return required or other or made.needs_target or name == "spread"


def network(options: dict[str, Any], dataset: Dataset, seed: int, name: str = "resnet") -> nn.Module:
    answers, *maps = dataset.outputs
    return networks.build(name, options, dataset.shape, answers, ("relu", {}), seed, maps=tuple(maps))


def train(
    student: nn.Module, dataset: Dataset, budget: Train, method: str, options: dict[str, Any],
    teacher: nn.Module | None, seed: int, augment: Augment = AUGMENT,
) -> float:  # fmt: skip
    """Train by the method of that name, and return the seconds that it took."""
    made = registry.create("method", method, options=options)
    return round(sum(epoch["seconds"] for epoch in fit(student, dataset, budget, made, teacher, seed, augment)), 1)


def fit(
    student: nn.Module, dataset: Dataset, budget: Train, method: Method, teacher: nn.Module | None, seed: int,
    augment: Augment = AUGMENT,
) -> list[dict[str, float]]:  # fmt: skip
    """Train, and return the log of every epoch. A method that needs no teacher does not get it."""
    with tempfile.TemporaryDirectory() as work:
        trained = distill.train(
            student, dataset, budget, method, teacher=teacher if method.needs_teacher else None, augment=augment,
            seed=seed, work=Path(work),
        )  # fmt: skip
    return trained.epochs


def accuracy(student: nn.Module, dataset: Dataset) -> float:
    """In percent, on the test images."""
    return 100 * float((distill.predict(student, dataset.test, dataset).argmax(1) == dataset.test.labels).mean())


def report(lines: list[dict[str, Any]]) -> str:
    one = {(line["seed"], line["row"]): line["score"] for line in lines}  # a teacher is trained again by every run
    seeds = sorted({seed for seed, _ in one})
    names = sorted({row for _, row in one}, key=lambda row: (FIRST.get(row, len(FIRST)), row))
    found = {row: [one[seed, row] for seed in seeds] for row in names}
    rows = []
    for name, values in found.items():
        gains = ["" if name in ("teacher", base) else gain(values, found[base]) for base in ("scratch", "kd")]
        rows.append([name, spread_of(values), *gains])
    kd = statistics.mean(found["kd"])
    below = [name for name, values in found.items() if name not in FIRST and statistics.mean(values) <= kd]
    text = f"Not above `kd` in the mean: {'; '.join(below)}."
    return (
        f"Test accuracy in percent of {lines[0]['images']} images, mean ± standard deviation over {len(found['kd'])}"
        f" seeds. The student, a ResNet-8 of half the width, learns from {IMAGES} labelled images (a tenth validates)"
        f" for {EPOCHS} epochs; the teacher, a ResNet-14 of half the width, has seen the whole training split. Within a"
        " seed everything but the method is the same; gains are differences within seeds, mean (range). Every method"
        " has the defaults of its options unless its row says otherwise; none was searched for.\n\n"
        + table(["method", "accuracy", "over scratch", "over kd"], rows)
        + f"\n\n{text} Attention transfer's published weight is for larger maps than those of 8x8 images; `ard` learns"
        " from attacked images alone, for an accuracy under attack that is not measured here; `dfad` sees none of the"
        " images, `mutual_sources` has one source only here, and `robust_prune` and `decorrelated_prune` end smaller"
        " than the others: these have sections of their own.\n\n"
        "Made by `benchmarks/methods/every_method.py`."
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
