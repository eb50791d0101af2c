"""Distillation of tasks other than classification, on the digits: real values, an embedding, and a map of classes.

    PYTHONPATH=benchmarks:benchmarks/methods python benchmarks/methods/tasks.py [--seeds 0 1 2] [--studies slant] > FILE
    PYTHONPATH=benchmarks:benchmarks/methods python benchmarks/methods/tasks.py --report FILE [FILE ...]

Targets, optimisers and learning rates are those of the recipes digits-slant, digits-embedding and digits-mask; networks
and epochs are smaller, and labels few, as in `every_method.py`. Within a seed everything but the method is the same.
Every study is a section of its own, written from the lines of that study alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from every_method import AUGMENT, EPOCHS, IMAGES, STUDENT, TEACHER, network, train
from results import gain, spread_of, table, write_section
from torch import nn

from edgekd import data, distill, registry
from edgekd.data import Dataset
from edgekd.data.corruptions import category, corrupted
from edgekd.data.dataset import TaskChoice
from edgekd.recipe import Augment, Train
from edgekd.tasks import Metric

SEVERITIES = (1, 3, 5)
CATEGORIES = ("noise", "blur", "digital")
# The student sees as many images in all as on the few labelled ones, but all of them, and no label.
UNLABELLED = "all images without labels"
BASE = "scratch"


@dataclass(frozen=True)
class Study:
    """A task, the networks and budgets for it, and the rows of its table: method and options."""

    title: str
    source: dict[str, Any]
    network: str
    teacher: dict[str, Any]
    student: dict[str, Any]
    teacher_budget: Train
    budget: Train
    rows: dict[str, tuple[str, dict[str, Any]]]
    task: TaskChoice | None = None
    augment: Augment = dataclasses.field(default_factory=Augment)
    is_corrupted: bool = False


STUDIES = {
    "slant": Study(
        "How far digits lean (`regression`): MAE in degrees, less is better",
        {"target": "slant"}, "resnet", TEACHER, STUDENT,
        Train(epochs=12, batch_size=64, lr=0.02, clip=1.0, keep="last"),
        Train(epochs=EPOCHS, batch_size=32, lr=0.02, clip=1.0, keep="last"),
        {
            BASE: ("scratch", {}),
            "regression": ("regression", {}),
            "regression, labels at half weight": ("regression", {"teacher_weight": 0.5, "label_weight": 0.5}),
            f"regression, {UNLABELLED}": ("regression", {}),
        },
        is_corrupted=True,
    ),
    "embedding": Study(
        "Digits found again by their nearest neighbour (`embedding`): recall@1 in percent",
        {}, "resnet", TEACHER, STUDENT,
        Train(epochs=12, batch_size=128, lr=0.05, clip=1.0, keep="last"),
        Train(epochs=EPOCHS, batch_size=32, lr=0.05, clip=1.0, keep="last"),
        {
            BASE: ("scratch", {}),
            "embedding": ("embedding", {}),
            "embedding, directions alone": ("embedding", {"relation_weight": 0.0, "label_weight": 0.0}),
        },
        task={"embedding": {"dimension": 16}},
        augment=AUGMENT,
    ),
    "mask": Study(
        "Which pixels belong to which digit (`kd` of every pixel): Dice in percent",
        {"target": "mask"}, "unet", {"channels": 24}, {"channels": 8},
        Train(epochs=12, batch_size=64, optimizer="adamw", lr=0.01, keep="last"),
        Train(epochs=EPOCHS, batch_size=32, optimizer="adamw", lr=0.01, keep="last"),
        {
            BASE: ("scratch", {}),
            "kd": ("kd", {}),
            "kd, weight 0.5, temperature 2": ("kd", {"kd_weight": 0.5, "temperature": 2.0}),
            "kd, temperature 4": ("kd", {"temperature": 4.0}),
            f"kd, {UNLABELLED}": ("kd", {"kd_weight": 1.0}),
        },
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--report", type=Path, nargs="+", help="what runs have printed: write docs/results.md from it")
    given = parser.parse_args()
    if given.report:
        lines = [json.loads(line) for file in given.report for line in file.read_text(encoding="utf-8").splitlines()]
        for name in sorted({line["study"] for line in lines}, key=list(STUDIES).index):
            own = [line for line in lines if line["study"] == name]
            write_section(f"methods_tasks_{name}", STUDIES[name].title, report(STUDIES[name], own))
        return
    for name in given.studies:
        for seed in given.seeds:
            run(name, STUDIES[name], seed)


def run(name: str, study: Study, seed: int) -> None:
    """Train a teacher and every student, and print a line of JSON for each."""
    many = load(study)
    # What images and labels are divided by must be the same for teacher and student.
    given = {"task": many.task.choice, "normalize": {"mean": many.mean, "std": many.std}}
    few = data.load("digits", study.source, train_limit=IMAGES, **given)
    kinds = registry.names("corruption") if study.is_corrupted else []
    bad = {kind: [corrupted(few.test.images, kind, severity) for severity in SEVERITIES] for kind in kinds}

    def tell(row: str, trained: nn.Module, seconds: float) -> None:
        def score(images: Any) -> float:
            answers = distill.predict(trained, dataclasses.replace(few.test, images=images), few)
            return (100 if few.task.metric.share else 1) * few.task.score(answers, few.test.labels)

        found = {
            "score": score(few.test.images),
            "corrupted": {kind: [score(images) for images in of_kind] for kind, of_kind in bad.items()},
        }
        print(json.dumps({"study": name, "seed": seed, "row": row, "seconds": seconds, **found}), flush=True)

    teacher = network(study.teacher, many, seed, study.network)
    tell("teacher", teacher, train(teacher, many, study.teacher_budget, "scratch", {}, None, seed, study.augment))
    for row, (method, options) in study.rows.items():
        student, seen, budget = network(study.student, few, seed, study.network), few, study.budget
        if row.endswith(UNLABELLED):
            seen = many
            budget = budget.model_copy(update={"epochs": round(budget.epochs * len(few.train) / len(many.train))})
        tell(row, student, train(student, seen, budget, method, options, teacher, seed, study.augment))


def load(study: Study) -> Dataset:
    return data.load("digits", study.source, task=study.task)


def report(study: Study, lines: list[dict[str, Any]]) -> str:
    seeds, loaded = sorted({line["seed"] for line in lines}), load(study)
    found = {row: [one for one in lines if one["row"] == row] for row in ("teacher", *study.rows)}
    found = {row: sorted(of_row, key=lambda line: line["seed"]) for row, of_row in found.items()}
    assert all(len(of_row) == len(seeds) for of_row in found.values()), "every row once for every seed"
    head = (
        f"Mean ± standard deviation over {len(seeds)} seeds, of {len(loaded.test)} test images; gains are differences"
        f" within seeds, mean (range). A student learns from {IMAGES} labelled images (a tenth validates) for {EPOCHS}"
        f" epochs; its teacher has seen all of them. Networks, with ReLU: {study.network} {told(study.student)}, and"
        f" {told(study.teacher)} as the teacher. Every method has the defaults of its options unless its row says"
        " otherwise; none was searched for."
    )
    tables = [scores(found, loaded.task.metric), *(robustness(found) if study.is_corrupted else [])]
    return "\n\n".join([head, *tables, "Made by `benchmarks/methods/tasks.py`."])


def told(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def scores(found: dict[str, list[dict[str, Any]]], metric: Metric) -> str:
    """Table of the clean scores, and which rows are no better than scratch."""
    values = {row: [line["score"] for line in of_row] for row, of_row in found.items()}
    rows = [
        [row, spread_of(of_row), "" if row in ("teacher", BASE) else gain(of_row, values[BASE])]
        for row, of_row in values.items()
    ]
    better, mixed, worse = [], [], []
    for row in values.keys() - {"teacher", BASE}:
        gains = [metric.goodness(a - b) for a, b in zip(values[row], values[BASE], strict=True)]
        (worse if statistics.mean(gains) <= 0 else better if min(gains) > 0 else mixed).append(f"`{row}`")
    said = ((better, "Better than scratch in every seed"), (mixed, "in the mean alone"), (worse, "not in the mean"))
    text = "; ".join(f"{title}: {', '.join(sorted(which)) or 'none'}" for which, title in said)
    return f"{table(['', metric.label, 'over scratch'], rows)}\n\n{text}."


def robustness(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Table of the mean error under corruptions, and whether it rises with the severity."""
    kinds = registry.names("corruption")

    def means(row: str, chosen: list[str], severities: tuple[int, ...]) -> list[float]:
        at = [SEVERITIES.index(severity) for severity in severities]
        return [statistics.mean(line["corrupted"][kind][i] for kind in chosen for i in at) for line in found[row]]

    base, rows, rising = means(BASE, kinds, SEVERITIES), [], []
    for row in found:
        whole = means(row, kinds, SEVERITIES)
        by_category = [means(row, [kind for kind in kinds if category(kind) == one], SEVERITIES) for one in CATEGORIES]
        by_severity = [means(row, kinds, (severity,)) for severity in SEVERITIES]
        shown = [f"{statistics.mean(one):.2f}" for one in (*by_category, *by_severity)]
        rows.append([row, spread_of(whole), "" if row in ("teacher", BASE) else gain(whole, base), *shown])
        errors = {kind: [statistics.mean(means(row, [kind], (one,))) for one in SEVERITIES] for kind in kinds}
        falling = [kind for kind, of_kind in errors.items() if of_kind != sorted(of_kind)]
        rising.append(f"{row}: {len(kinds) - len(falling)}" + (f" (not {', '.join(falling)})" if falling else ""))
    header = ["", "all kinds", "over scratch", *CATEGORIES, *(f"severity {severity}" for severity in SEVERITIES)]
    return [
        f"The same networks on corrupted test images, MAE; the mean of {len(kinds)} kinds in severities"
        f" {', '.join(map(str, SEVERITIES))}. The row without labels has the teacher's values for all training images,"
        " in about as many steps as the others; scratch has the few labels alone:",
        table(header, rows),
        f"Kinds of {len(kinds)} whose error never falls from one severity to the next, in the mean over the seeds:"
        f" {'; '.join(rising)}.",
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
