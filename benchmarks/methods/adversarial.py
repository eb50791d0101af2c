"""The adversarial methods' own checks on the digits: squeezed_adversarial, bss, dfad, ard.

    PYTHONPATH=benchmarks python benchmarks/methods/adversarial.py squeezed|bss|ard|dfad|dfad_long [--seeds 0 1] > FILE
    PYTHONPATH=benchmarks python benchmarks/methods/adversarial.py --report FILE [FILE ...]

Within a seed the teacher, the student's first weights, the budget and the test images are the same for all rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import table, write_section
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd import data, distill, networks, registry
from edgekd.data import Dataset, Split
from edgekd.methods import Method, Setting, Step
from edgekd.methods.attacks import Ball, boundary, evaluating, limits, pgd, withstood
from edgekd.methods.bss import base_samples, similarity
from edgekd.methods.squeezed_adversarial import attention
from edgekd.recipe import Augment, Train

IMAGES = 200
TEACHER, STUDENT = {"depth": 14, "width": 0.5}, {"depth": 8, "width": 0.5}
TEACHER_BUDGET = Train(epochs=12, batch_size=64, lr=0.1, keep="last")
BUDGET = Train(epochs=30, batch_size=32, lr=0.05, keep="last")
DFAD_BUDGET = Train(epochs=25, batch_size=32, lr=0.05, keep="last")
LONG_BUDGET = DFAD_BUDGET.model_copy(update={"epochs": 100})
ROBUST_BUDGET = Train(epochs=15, batch_size=64, lr=0.05, keep="last")
EPSILON, TRAIN_STEPS = 25.5, 5  # 0.1 of the pixel scale
SANITY = 128.0

Result = dict[str, Any]


class AdversarialTraining(Method):
    """Cross-entropy on attacked images (Madry et al., ICLR 2018): how the robust teacher, and a baseline, are made."""

    needs_teacher = False

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        self.ball = Ball.of(EPSILON, EPSILON / 4, setting.mean, setting.std)

    def forward(self, step: Step) -> dict[str, Tensor]:
        with evaluating(step.student):
            attacked = pgd(lambda x: F.cross_entropy(step.student(x), step.y), step.x, self.ball, TRAIN_STEPS)
        return {"ce": F.cross_entropy(step.student(attacked), step.y)}


def made(name: str, **options: Any) -> Method:
    method: Method = registry.create("method", name, options=options)
    return method


def network(options: dict[str, Any], dataset: Dataset, seed: int) -> nn.Module:
    return networks.build("resnet", options, dataset.shape, dataset.num_classes, ("relu", {}), seed)


def train(
    student: nn.Module, dataset: Dataset, budget: Train, method: Method, teacher: nn.Module | None, seed: int
) -> Method:
    with tempfile.TemporaryDirectory() as work:
        distill.train(
            student, dataset, budget, method, teacher=teacher if method.needs_teacher else None,
            augment=Augment(crop=1), seed=seed, work=Path(work),
        )  # fmt: skip
    return method


def answers(student: nn.Module, dataset: Dataset) -> np.ndarray:
    return distill.predict(student, dataset.test, dataset).argmax(1)


def accuracy(student: nn.Module, dataset: Dataset) -> float:
    """In percent, on the test images."""
    return 100 * float((answers(student, dataset) == dataset.test.labels).mean())


def taught(dataset: Dataset, seed: int, method: Method | None = None) -> nn.Module:
    """A teacher that has seen all training images."""
    teacher = network(TEACHER, dataset, seed)
    train(teacher, dataset, TEACHER_BUDGET, method or made("scratch"), None, seed)
    return teacher.requires_grad_(False)


def chosen(rows: dict[str, Any], only: list[str]) -> dict[str, Any]:
    return {row: made for row, made in rows.items() if not only or row in only}


def test_tensors(dataset: Dataset) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Test images and labels; mean and std as attacks take them."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    return torch.from_numpy(dataset.normalized("test")), torch.from_numpy(dataset.test.labels), mean, std


def squeezed(seed: int, only: list[str]) -> Iterator[Result]:
    """The ablation: cross-entropy, with the adversary, with the attentions too; and where attention lies."""
    few = data.load("digits", {}, train_limit=IMAGES)
    teacher = taught(data.load("digits", {}), seed)
    yield {"row": "teacher", "top1": accuracy(teacher, few)}
    plain = {"kd_weight": 0.0, "ce_weight": 1.0}
    rows = {
        "scratch": made("scratch"),
        "kd": made("kd"),
        "labels, adversary": made("squeezed_adversarial", attention_weight=0.0, **plain),
        "labels, adversary, attention": made("squeezed_adversarial", **plain),
        "squeezed_adversarial, attention_weight 1": made("squeezed_adversarial", attention_weight=1.0),
        "squeezed_adversarial": made("squeezed_adversarial"),
    }
    for row, method in chosen(rows, only).items():
        student = network(STUDENT, few, seed)
        train(student, few, BUDGET, method, teacher, seed)
        yield {"row": row, "top1": accuracy(student, few)}
    x, y, *_ = test_tensors(few)
    with torch.no_grad(), method.teacher_taps.recording() as maps:
        right = teacher(x).argmax(1) == y
    first = method.teacher_taps.paths[0]
    seen = attention(maps[first], method.teacher_heads[0], y)[right, 0]
    inside = seen[:, 2:-2, 2:-2].sum((1, 2)) / seen.sum((1, 2)).clamp(min=1e-9)
    yield {"row": "central", "share": float(inside.mean()), "uniform": 16 / 64}


def bss(seed: int, only: list[str]) -> Iterator[Result]:
    """Students of few images; what the attack does to the teacher, and how alike the ways to the boundary are."""
    few = data.load("digits", {}, train_limit=IMAGES)
    teacher = taught(data.load("digits", {}), seed)
    yield {"row": "teacher", "top1": accuracy(teacher, few)}
    x, y, mean, std = test_tensors(few)
    teachers, (low, high) = teacher(x), limits(mean, std)
    for row in chosen(dict.fromkeys(("scratch", "kd", "bss")), only):
        student = network(STUDENT, few, seed)
        train(student, few, BUDGET, made(row), teacher, seed)
        told = base_samples(teachers, torch.from_numpy(distill.predict(student, few.test, few)), y, len(y))
        torch.manual_seed(seed)
        others = teachers[told].scatter(1, y[told][:, None], float("-inf"))
        target = torch.multinomial(others.softmax(1), 1)[:, 0]
        ways = []
        for one in (teacher, student.eval()):
            attacked, turned = boundary(one, x[told], y[told], target, low, high, 0.3, 10)
            ways.append(attacked - x[told])
            if one is teacher:
                top = teacher(attacked).softmax(1).topk(2, dim=1).values
                gap = float((top[:, 0] - top[:, 1]).median())
                facts = {"turned": float(turned.float().mean()), "gap": gap}
        magsim, angsim = (float(value) for value in similarity(*ways))
        yield {"row": row, "top1": accuracy(student, few), "magsim": magsim, "angsim": angsim, **facts}


def dfad_long(seed: int, only: list[str]) -> Iterator[Result]:
    """The same for four times as long, of what has no data."""
    yield from dfad(seed, only or ["kd on noise", "dfad"], LONG_BUDGET)


def dfad(seed: int, only: list[str], budget: Train = DFAD_BUDGET) -> Iterator[Result]:
    """The student without data, against one with the data and one with noise in its place."""
    many = data.load("digits", {})
    teacher = taught(many, seed)
    yield {"row": "teacher", "top1": accuracy(teacher, many)}
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, many.train.images.shape, dtype=np.uint8)
    rows: dict[str, tuple[Method, Dataset]] = {
        "scratch": (made("scratch"), many),
        "kd": (made("kd"), many),
        "kd on noise": (
            made("kd", kd_weight=1.0, ce_weight=0.0),
            replace(many, train=Split(noise, many.train.labels)),
        ),
        "dfad": (made("dfad"), many),
    }
    for row, (method, dataset) in chosen(rows, only).items():
        student = network(STUDENT, many, seed)
        train(student, dataset, budget, method, teacher, seed)
        same = 100 * float((answers(student, many) == answers(teacher, many)).mean())
        yield {"row": row, "top1": accuracy(student, many), "agreement": same}


def ard(seed: int, only: list[str]) -> Iterator[Result]:
    """Robust accuracy by what the teacher is and how it teaches."""
    many = data.load("digits", {})
    teachers = {"natural": taught(many, seed), "robust": taught(many, seed, AdversarialTraining())}
    for kind, teacher in teachers.items():
        yield {"row": f"teacher, {kind}", **attacked(teacher, many, seed)}
    attack = {"epsilon": EPSILON, "step_size": EPSILON / 4, "steps": TRAIN_STEPS}
    robust = {"kl_reduction": "batchmean", "temperature": 4.0, **attack}
    rows: dict[str, tuple[Method, str]] = {
        "scratch": (made("scratch"), "natural"),
        "kd": (made("kd"), "natural"),
        "kd, robust teacher": (made("kd"), "robust"),
        "adversarial training": (AdversarialTraining(), "natural"),
        "ard": (made("ard", **robust), "robust"),
        "ard, replays 4": (made("ard", **robust, replays=4), "robust"),
    }
    for row, (method, kind) in chosen(rows, only).items():
        student = network(STUDENT, many, seed)
        train(student, many, ROBUST_BUDGET, method, teachers[kind], seed)
        yield {"row": row, **attacked(student, many, seed)}


def attacked(student: nn.Module, dataset: Dataset, seed: int) -> dict[str, float]:
    """Accuracy in percent: clean, under PGD-20, and under an attack that must succeed."""
    x, y, mean, std = test_tensors(dataset)
    student.requires_grad_(False)
    torch.manual_seed(seed)
    robust, sanity = (
        100 * float(withstood(student, x, y, Ball.of(epsilon, epsilon / 8, mean, std), 20).float().mean())
        for epsilon in (EPSILON, SANITY)
    )
    return {"top1": accuracy(student, dataset), "robust": robust, "sanity": sanity}


EXPERIMENTS = {"squeezed": squeezed, "bss": bss, "dfad": dfad, "dfad_long": dfad_long, "ard": ard}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="students to train; default: all")
    parser.add_argument("--report", type=Path, nargs="+", help="what runs have printed: write docs/results.md from it")
    given = parser.parse_args()
    if given.report:
        lines = [json.loads(line) for file in given.report for line in file.read_text(encoding="utf-8").splitlines()]
        write_section("methods_adversarial", "Adversarial methods on the digits", report(lines))
        return
    for seed in given.seeds:
        for line in EXPERIMENTS[given.experiment](seed, given.only):
            print(json.dumps({"experiment": given.experiment, "seed": seed, **line}), flush=True)


def report(lines: list[Result]) -> str:
    """A subsection for every experiment that was run."""
    digits = data.load("digits", {})
    texts = [about(found) for name, about in REPORTS.items() if (found := Found(name, lines)).seeds]
    if (longer := Found("dfad_long", lines)).seeds:
        texts.append(about_longer(longer))
    seeds = len(Found("", lines).seeds)
    budget = (
        f"Digits, 8x8 pixels, {seeds} seeds; accuracy in percent of {len(digits.test)} test images, mean ± standard"
        " deviation; gains are differences within seeds, mean (range). Teacher: a ResNet-14 of half the width after"
        f" {TEACHER_BUDGET.epochs} epochs on all {len(digits.train)} training images; student: a ResNet-8 of half the"
        " width, its first weights and its budget the same in every row of a table."
    )
    return "\n\n".join([budget, *texts, "Made by `benchmarks/methods/adversarial.py`."])


class Found:
    """The lines of one experiment (of all, for an empty name), by row and in the order of the seeds."""

    def __init__(self, experiment: str, lines: list[Result]) -> None:
        own = {(line["seed"], line["row"]): line for line in lines if experiment in ("", line["experiment"])}
        self.seeds = sorted({seed for seed, _ in own})
        self.rows: dict[str, list[Result]] = {}
        for (_, row), line in sorted(own.items(), key=lambda item: int(item[0][0])):
            self.rows.setdefault(row, []).append(line)

    def values(self, row: str, key: str = "top1") -> list[float]:
        return [float(line[key]) for line in self.rows[row]]

    def mean(self, row: str, key: str = "top1") -> str:
        values = self.values(row, key)
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"

    def gain(self, row: str, base: str, key: str = "top1") -> str:
        if row == base:
            return ""
        changes = [a - b for a, b in zip(self.values(row, key), self.values(base, key), strict=True)]
        return f"{statistics.mean(changes):+.2f} ({min(changes):+.2f} to {max(changes):+.2f})"

    def verdict(self, row: str, base: str, key: str = "top1") -> str:
        """In words, whether a row beats another in the mean."""
        change = statistics.mean(self.values(row, key)) - statistics.mean(self.values(base, key))
        how = "above" if change > 0 else "not above"
        return f"`{row}` is {how} `{base}` in the mean ({change:+.2f} points)"


def students(found: Found) -> list[str]:
    return [row for row in found.rows if not row.startswith("teacher") and row != "central"]


def compared(found: Found) -> str:
    """A table of accuracies against scratch and kd."""
    rows = [["teacher", found.mean("teacher"), "", ""]]
    rows += [
        [row, found.mean(row), found.gain(row, "scratch"), found.gain(row, "kd") if row != "scratch" else ""]
        for row in students(found)
    ]
    return table(["method", "accuracy", "over scratch", "over kd"], rows)


def about_squeezed(found: Found) -> str:
    share, uniform = statistics.mean(found.values("central", "share")), found.rows["central"][0]["uniform"]
    return (
        f"### squeezed_adversarial\n\n{IMAGES} labelled images, {BUDGET.epochs} epochs. The rows that begin with"
        " `labels` are without the divergence of the logits, which is kd's; its weights are kd's too. The default"
        f" weight of the attentions was lowered to 0.1 after the row with 1.\n\n{compared(found)}\n\n"
        f"{found.verdict('squeezed_adversarial', 'kd')}. At the teacher's first level {share:.0%} of the attention to"
        f" images that it tells right lies in the central 4x4 pixels, which are {uniform:.0%} of the area."
    )


def about_bss(found: Found) -> str:
    rows = [[row, found.mean(row, "magsim"), found.mean(row, "angsim")] for row in students(found)]
    turned, gap = (statistics.mean(found.values("kd", key)) for key in ("turned", "gap"))
    return (
        f"### bss\n\n{IMAGES} labelled images, {BUDGET.epochs} epochs.\n\n{compared(found)}\n\n"
        f"{found.verdict('bss', 'kd')}. With the published step size of 0.3, {turned:.0%} of the attacked test images"
        f" turn within 10 steps; the median gap of the teacher's two largest probabilities there is {gap:.2f} (0 at the"
        " boundary: the step is too long here). How alike the ways to the boundary are, teacher and student, on test"
        " images that both tell right:\n\n" + table(["method", "MagSim", "AngSim"], rows)
    )


def about_dfad(found: Found) -> str:
    rows = [[row, found.mean(row), found.mean(row, "agreement")] for row in students(found)]
    steps = DFAD_BUDGET.epochs * (len(data.load("digits", {}).train) // DFAD_BUDGET.batch_size)
    return (
        f"### dfad\n\n{steps} steps of the student, a fifth as many of the generator (published for CIFAR:"
        " 125,000).\n\n"
        + table(["method", "accuracy", "agreement with the teacher"], [["teacher", found.mean("teacher"), ""], *rows])
        + "\n\n`scratch` and `kd` have the training images; `kd on noise` has noise in their place; `dfad` has none."
        f" {found.verdict('dfad', 'kd')}; {found.verdict('dfad', 'kd on noise')}."
    )


def about_longer(found: Found) -> str:
    texts = [f"`{row}` {', '.join(f'{value:.2f}' for value in found.values(row))}" for row in students(found)]
    ratio = LONG_BUDGET.epochs // DFAD_BUDGET.epochs
    return f"`dfad` for {ratio} times as long, {len(found.seeds)} seed(s): {'; '.join(texts)}."


def about_ard(found: Found) -> str:
    keys = ("top1", "robust", "sanity")
    rows = [[row, *(found.mean(row, key) for key in keys)] for row in found.rows]
    return (
        f"### ard\n\nAll training images, {ROBUST_BUDGET.epochs} epochs; training attacks are PGD-{TRAIN_STEPS} within"
        f" {EPSILON}/255, the robust teacher's too. Under PGD-20 within {EPSILON}/255, and within {SANITY:g}/255, where"
        " an attack must succeed:\n\n" + table(["network", "as they are", "PGD-20", "must fail"], rows) + "\n\n"
        + "; ".join(
            found.verdict(row, base, "robust")
            for row, base in (
                ("ard", "adversarial training"), ("ard, replays 4", "ard"), ("ard", "kd"), ("kd, robust teacher", "kd")
            )
        )
        + ", in accuracy under PGD-20. `ard` has temperature 4 and KL summed over the classes here."
    )  # fmt: skip


REPORTS = {"squeezed": about_squeezed, "bss": about_bss, "ard": about_ard, "dfad": about_dfad}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
