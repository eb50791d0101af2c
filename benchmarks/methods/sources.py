"""Several teachers, growing ones, and angles on the digits: what the methods' own papers would have one check.

PYTHONPATH=benchmarks python benchmarks/methods/sources.py [--studies growing] [--seeds 0 1 2] > FILE
PYTHONPATH=benchmarks python benchmarks/methods/sources.py --report FILE [FILE ...]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from comparison import Result, Rows, Study, command, compared, few, made, many, setting, students, teacher
from every_method import IMAGES, TEACHER, TEACHER_BUDGET, accuracy, fit, network
from torch import nn

from edgekd.data import Dataset, Split
from edgekd.methods import Method
from edgekd.networks import Ensemble

TINY = {"depth": 8, "width": 0.125}
# Domains that source models come from; the student's images are plain.
DOMAINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "noisy": lambda x: np.clip(x + np.random.default_rng(0).normal(0, 60, x.shape), 0, 255).astype(np.uint8),
    "inverted": lambda x: 255 - x,
    "coarse": lambda x: x.reshape(*x.shape[:2], 4, 2, 4, 2).mean((3, 5)).repeat(2, 2).repeat(2, 3).astype(np.uint8),
}


def teachers(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """One teacher, two, and cross-layer matrices of both."""
    both = Ensemble([teacher(seed), trained(many(), seed, of_weights=100 + seed)], "logits")
    for name, one in (("one teacher", teacher(seed)), ("two teachers", both)):
        yield {"row": name, "top1": accuracy(one.eval(), many())}
    yield from students({"scratch": made("scratch"), "kd, one teacher": made("kd")}, seed, only, few(IMAGES))
    rows = {
        "kd, two teachers": made("kd"),
        "cross_layer, two teachers, no first stage": made("cross_layer", first=0.0),
        "cross_layer, two teachers": made("cross_layer"),
    }
    yield from students(rows, seed, only, few(IMAGES), of=both)


def about_teachers(rows: Rows) -> str:
    one, two, stages = "kd, one teacher", "kd, two teachers", "cross_layer, two teachers"
    said = f"{rows.says(two, one)}; {rows.says(stages, two)}."
    return f"{setting(rows, few(IMAGES))}\n\n{compared(rows, ('scratch', one))} {said}"


def sources(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """Sources that come from other domains."""
    ensemble = Ensemble([trained(of_domain(many(), name), seed) for name in DOMAINS], "logits")
    for name, source in zip(DOMAINS, ensemble.members, strict=True):
        yield {"row": f"source, {name}", "top1": accuracy(source.eval(), many())}
    yield {"row": "mean of the sources", "top1": accuracy(ensemble.eval(), many())}
    rows = {
        "scratch": made("scratch"),
        "kd, mean of the sources": made("kd"),
        "mutual_sources": made("mutual_sources"),
        "mutual_sources, one round": made("mutual_sources", rounds=1),
    }
    yield from students(rows, seed, only, few(IMAGES), of=ensemble)


def about_sources(rows: Rows) -> str:
    return (
        f"{setting(rows, few(IMAGES))} Sources have seen other images, noisy, inverted or coarse ones, and the"
        f" student's are plain.\n\n{compared(rows, ('scratch', 'kd, mean of the sources'))}"
    )


def growing(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """A tiny student, and an assistant between it and the teacher."""
    rows = {name: made(name) for name in ("scratch", "kd", "growing_assistant")}
    yield from students(rows, seed, only, few(IMAGES), size=TINY, about=sizes)


def sizes(student: nn.Module, method: Method) -> Result:
    """Parameters."""
    return {"parameters": sum(parameter.numel() for parameter in student.parameters())}


def about_growing(rows: Rows) -> str:
    whole = sum(parameter.numel() for parameter in network(TEACHER, many(), 0).parameters())
    small = int(rows.values("kd", "parameters")[0])
    size = f"a ResNet-8 with {small:,} of the teacher's {whole:,} parameters"
    said = f"{rows.says('kd', 'scratch')}; {rows.says('growing_assistant', 'kd')}."
    cost = "An epoch of growing_assistant trains up to three more networks of the student's size."
    return f"{setting(rows, few(IMAGES), student=size)} {cost}\n\n{compared(rows)} {said}"


def angular(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """The angles between the classifier's class vectors."""
    rows = {name: made(name) for name in ("scratch", "kd", "angular")}
    rows |= {f"angular, length {length:g}": made("angular", length=length) for length in (1.0, 5.0)}
    rows["kd, angular"] = made("combined", methods=["kd", "angular"])
    yield from students(
        rows, seed, only, few(IMAGES), about=lambda student, method: {"angle": mean_angle(student)}
    )  # fmt: skip


def about_angular(rows: Rows) -> str:
    return (
        f"{setting(rows, few(IMAGES))} Angles are those between two class vectors of the classifier, in degrees; in a"
        f" simplex of ten they have 96.4.\n\n{compared(rows, **{'mean angle': 'angle'})}"
        f" {rows.says('angular', 'scratch', -0.1)}."
    )


def mean_angle(student: nn.Module) -> float:
    """Between two class vectors of the classifier, in degrees."""
    unit = nn.functional.normalize(student.fc.weight.detach().double()).numpy()
    above = np.triu_indices(len(unit), 1)
    return float(np.degrees(np.arccos((unit @ unit.T)[above])).mean())


def trained(dataset: Dataset, seed: int, of_weights: int | None = None) -> nn.Module:
    """A teacher of these images, whose first weights may be another seed's."""
    one = network(TEACHER, dataset, seed if of_weights is None else of_weights)
    fit(one, dataset, TEACHER_BUDGET, made("scratch"), None, seed)
    return one.requires_grad_(False)


def of_domain(dataset: Dataset, name: str) -> Dataset:
    def seen(split: Split) -> Split:
        return Split(DOMAINS[name](split.images.astype(np.float64)).astype(np.uint8), split.labels)

    return dataclasses.replace(dataset, train=seen(dataset.train), val=seen(dataset.val))


STUDIES = {
    "teachers": Study("An ensemble of teachers (`cross_layer`)", teachers, about_teachers),
    "sources": Study("Sources of other domains (`mutual_sources`)", sources, about_sources),
    "growing": Study("A tiny student (`growing_assistant`)", growing, about_growing),
    "angular": Study("Angles between classes (`angular`)", angular, about_angular),
}

if __name__ == "__main__":
    command(__doc__ or "", "sources", STUDIES)
