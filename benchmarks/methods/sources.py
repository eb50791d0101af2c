"""Several teachers, growing ones, angles and boards on the digits: what the methods' own papers would have one check.

    PYTHONPATH=benchmarks python benchmarks/methods/sources.py [--seeds 0 1 2] [--studies growing] > FILE
    PYTHONPATH=benchmarks python benchmarks/methods/sources.py --report FILE [FILE ...]

Data, budgets and networks are those of `digits.py`; within a seed everything but the method is the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import BUDGET, EPOCHS, IMAGES, STUDENT, TEACHER, TEACHER_BUDGET, accuracy, gain, network, train
from results import table, write_section
from torch import nn

from edgekd import data, networks
from edgekd.data import Dataset, Split
from edgekd.networks import Ensemble
from edgekd.stages.spreading import silences

TINY = {"depth": 8, "width": 0.125}
STUDIES = ["teachers", "sources", "growing", "angular", "boards"]
BOARDS, FILTERS = 4, 32
PART = {"network": "resnet", "depth": 8, "width": 0.25}
# Domains that source models come from; the student's images are plain.
DOMAINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "noisy": lambda x: np.clip(x + np.random.default_rng(0).normal(0, 60, x.shape), 0, 255).astype(np.uint8),
    "inverted": lambda x: 255 - x,
    "coarse": lambda x: x.reshape(*x.shape[:2], 4, 2, 4, 2).mean((3, 5)).repeat(2, 2).repeat(2, 3).astype(np.uint8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--studies", nargs="+", default=STUDIES, choices=STUDIES)
    parser.add_argument("--report", type=Path, nargs="+", help="what runs have printed: write docs/results.md from it")
    given = parser.parse_args()
    if given.report:
        lines = [json.loads(line) for file in given.report for line in file.read_text(encoding="utf-8").splitlines()]
        write_section("methods_sources", "Several teachers, growing ones, angles and boards", report(lines))
        return
    for seed in given.seeds:
        Seed(seed).run(given.studies)


class Seed:
    """All trainings of one seed, each told as a line of JSON."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.many, self.few = data.load("digits", {}), data.load("digits", {}, train_limit=IMAGES)

    def run(self, studies: list[str]) -> None:
        for study in studies:
            getattr(self, study)()

    @cached_property
    def first(self) -> nn.Module:
        return self.teacher(self.many, self.seed)

    def teachers(self) -> None:
        both = Ensemble([self.first, self.teacher(self.many, 100 + self.seed)], "logits")
        for name, teacher in (("one teacher", self.first), ("two teachers", both)):
            self.tell("teachers", name, accuracy(teacher.eval(), self.many))
        self.student("teachers", "scratch", "scratch", {}, None)
        self.student("teachers", "kd, one teacher", "kd", {}, self.first)
        self.student("teachers", "kd, two teachers", "kd", {}, both)
        self.student("teachers", "cross_layer, two teachers, no first stage", "cross_layer", {"first": 0.0}, both)
        self.student("teachers", "cross_layer, two teachers", "cross_layer", {}, both)

    def sources(self) -> None:
        sources = Ensemble([self.teacher(of_domain(self.many, name), self.seed) for name in DOMAINS], "logits")
        for name, source in zip(DOMAINS, sources.members, strict=True):
            self.tell("sources", f"source, {name}", accuracy(source.eval(), self.many))
        self.tell("sources", "mean of the sources", accuracy(sources.eval(), self.many))
        self.student("sources", "scratch", "scratch", {}, None)
        self.student("sources", "kd, mean of the sources", "kd", {}, sources)
        self.student("sources", "mutual_sources", "mutual_sources", {}, sources)

    def growing(self) -> None:
        for name in ("scratch", "kd", "growing_assistant"):
            self.student("growing", name, name, {}, self.first, TINY)

    def angular(self) -> None:
        for name in ("scratch", "kd", "angular"):
            self.student("angular", name, name, {}, self.first)
        self.student("angular", "combined: kd, angular", "combined", {"methods": ["kd", "angular"]}, self.first)

    def boards(self) -> None:
        self.spread("scratch", 1, "scratch", {})
        self.spread("1 copy, no silence in training", 1, "spread", {"silent": 0.0})
        self.spread("1 copy", 1, "spread", {})
        self.spread("2 copies", 2, "spread", {})

    def teacher(self, dataset: Dataset, seed: int) -> nn.Module:
        made = network(TEACHER, dataset, seed)
        train(made, dataset, TEACHER_BUDGET, "scratch", {}, None, self.seed)
        return made

    def student(
        self, study: str, row: str, method: str, options: dict[str, Any], teacher: nn.Module | None,
        size: dict[str, Any] = STUDENT,
    ) -> None:  # fmt: skip
        made = network(size, self.few, self.seed)
        train(made, self.few, BUDGET, method, options, teacher, self.seed)
        self.tell(study, row, accuracy(made, self.few), angle=mean_angle(made))

    def spread(self, row: str, copies: int, method: str, options: dict[str, Any]) -> None:
        """Train a student of four boards, and ask it with every set of silent ones."""
        chosen = {"part": PART, "boards": BOARDS, "copies": copies, "filters": FILTERS}
        made = networks.build("spread", chosen, self.few.shape, self.few.num_classes, ("relu", {}), self.seed)
        train(made, self.few, BUDGET, method, options, self.first, self.seed)
        test = self.few.test
        with torch.no_grad():
            x = torch.from_numpy(self.few.normalize(test.images))
            features = torch.stack([part(x) for part in made.eval().parts], 1).numpy()
            head = lambda heard: made.head(torch.from_numpy(heard)).detach().numpy()  # noqa: E731
            found = silences(features, head, lambda logits: 100 * float((logits.argmax(1) == test.labels).mean()))
        for one in found:
            self.tell("boards", row, one["score"], silent=one["silent"], lowest=one["lowest_score"])

    def tell(self, study: str, row: str, top1: float, **more: float) -> None:
        print(json.dumps({"seed": self.seed, "study": study, "row": row, "top1": top1, **more}), flush=True)


def of_domain(dataset: Dataset, name: str) -> Dataset:
    def seen(split: Split) -> Split:
        return Split(DOMAINS[name](split.images.astype(np.float64)).astype(np.uint8), split.labels)

    return dataclasses.replace(dataset, train=seen(dataset.train), val=seen(dataset.val))


def mean_angle(student: nn.Module) -> float:
    """Between two class vectors of the classifier, in degrees."""
    unit = nn.functional.normalize(student.fc.weight.detach().double()).numpy()
    above = np.triu_indices(len(unit), 1)
    return float(np.degrees(np.arccos((unit @ unit.T)[above])).mean())


def report(lines: list[dict[str, Any]]) -> str:
    seeds = sorted({line["seed"] for line in lines})
    parts = [
        f"Test accuracy in percent of 359 digits, mean ± standard deviation over {len(seeds)} seeds; gains are"
        f" differences within seeds, mean (range). Budgets are those of `digits.py`: {IMAGES} labelled images and"
        f" {EPOCHS} epochs for a student, all images for a teacher; defaults of all options, none was searched for."
    ]
    for title, study, base in (
        ("An ensemble of teachers", "teachers", "kd, one teacher"),
        ("Sources of other domains (`mutual_sources`): the student's images are plain", "sources",
         "kd, mean of the sources"),
        ("A tiny student (`growing_assistant`)", "growing", "kd"),
        ("Angles between classes (`angular`); a simplex of ten has 96.4 degrees", "angular", "kd"),
    ):  # fmt: skip
        if chosen := [line for line in lines if line["study"] == study]:
            parts += [f"### {title}", accuracies(chosen, base)]
    if chosen := [line for line in lines if line["study"] == "boards"]:
        parts += ["### Silent boards (`spread`)", silent_boards(chosen)]
    told = {line["study"] for line in lines}
    if missing := [study for study in STUDIES if study not in told]:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    return "\n\n".join([*parts, "Made by `benchmarks/methods/sources.py`."])


def accuracies(lines: list[dict[str, Any]], base: str) -> str:
    found = by_row(lines, lambda line: line["row"])
    angles = by_row([line | {"top1": line.get("angle", np.nan)} for line in lines], lambda line: line["row"])
    rows, below = [], []
    for name, values in found.items():
        is_student = not np.isnan(angles[name][0])
        gains = ["" if not is_student or name == other else gain(values, found[other]) for other in ("scratch", base)]
        angle = f"{statistics.mean(angles[name]):.1f}" if is_student else ""
        rows.append([name, spread_of(values), *gains, angle])
        if is_student and name not in ("scratch", base) and statistics.mean(values) <= statistics.mean(found[base]):
            below.append(f"`{name}`")
    text = f"Not above {base} in the mean: {'; '.join(below) or 'none'}."
    return table(["", "accuracy", "over scratch", f"over {base}", "mean angle"], rows) + f"\n\n{text}"


def silent_boards(lines: list[dict[str, Any]]) -> str:
    found = by_row(lines, lambda line: (line["row"], line["silent"]))
    names = list(dict.fromkeys(name for name, _ in found))
    rows = []
    for name in names:
        whole = statistics.mean(found[name, 0])
        half = statistics.mean(found[name, BOARDS // 2]) / whole
        rows.append([name, *(spread_of(found[name, silent]) for silent in range(BOARDS)), f"{half:.1%}"])
    header = ["", *(f"{silent} silent" for silent in range(BOARDS)), "kept with half silent"]
    text = (
        f"{BOARDS} boards, each a ResNet-8 of a quarter of the width; accuracy is the mean over all sets of that many"
        " silent boards. Louvain communities, as in NoNN, were not tried: they are not equal."
    )
    return f"{text}\n\n{table(header, rows)}"


def by_row(lines: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> dict[Any, list[float]]:
    found: dict[Any, list[float]] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        found.setdefault(key(line), []).append(line["top1"])
    return found


def spread_of(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
