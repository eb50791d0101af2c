"""What the papers of single methods claim, checked on the digits: each study is a section of its own.

PYTHONPATH=benchmarks python benchmarks/methods/checks.py [--studies geometric] [--seeds 0 1 2] > FILE
PYTHONPATH=benchmarks python benchmarks/methods/checks.py --report FILE [FILE ...]
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from comparison import Result, Rows, Study, command, compared, few, made, many, setting, students, teacher
from every_method import BUDGET, IMAGES, STUDENT, TEACHER, TEACHER_BUDGET, accuracy, fit, network
from results import table
from torch import Tensor, nn

from edgekd import data, distill
from edgekd.data import Dataset, Domain
from edgekd.methods import Method, Setting, Step
from edgekd.methods.attacks import evaluating
from edgekd.methods.decorrelated_prune import DecorrelatedPrune
from edgekd.methods.online_peers import OnlinePeers
from edgekd.methods.taps import Taps

TENTH = 144  # of the 1,438 images that are no test images; a tenth of them validates
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
FALLING = {"temperature 8 to 1": {"linear": [8.0, 1.0]}, "temperature 8 to 1, cosine": {"cosine": [8.0, 1.0]},
           "temperature 4 to 1": {"linear": [4.0, 1.0]}}  # fmt: skip
PAIRS, STEPS = (10, 100, 1000), 150
ALL_PAIRS, THE_REST = "kd, all pairs without labels", "kd, the rest without labels"
SENSOR_ROWS: dict[str, dict[str, Any]] = {
    "kd": {"kd_weight": 0.9},
    "kd_weight 1 to 0": {"kd_weight": {"linear": [1.0, 0.0]}},
    "kd_weight 1 to 0, cosine": {"kd_weight": {"cosine": [1.0, 0.0]}},
    "where the teacher is right": {"kd_weight": 0.9, "selective": "right"},
    THE_REST: {"kd_weight": 0.9, "unlabelled_weight": 0.9},
}


def dense_flow(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """Dense flow and its adversaries, alone and beside kd."""
    both = made("combined", methods=["kd", "dense_flow"])
    rows = {"scratch": made("scratch"), "kd": made("kd"), "dense_flow": made("dense_flow"), "kd, dense_flow": both}
    yield from students(rows, seed, only, few(IMAGES))


def about_dense_flow(rows: Rows) -> str:
    flow, right = (
        [statistics.mean(rows.values("dense_flow", f"{when}_train_{name}")) for when in ("first", "last")]
        for name in ("loss_euclidean", "discriminator_accuracy")
    )
    return (
        f"{setting(rows, few(IMAGES))}\n\n{compared(rows)}\n\n{rows.says('dense_flow', 'scratch', 0.3)}. From the first"
        f" epoch to the last the distance of the flows goes from {flow[0]:.3g} to {flow[1]:.3g}, and the share that the"
        f" discriminators tell right from {right[0]:.0%} to {right[1]:.0%} (one half where they cannot tell; 50 to 60 %"
        " was expected)."
    )


def geometric(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """Neighbourhoods of local activations with a tenth of the labels, alone and beside kd."""
    contrast = {"geometric": {"form": "contrast"}}
    rows = {
        "scratch": made("scratch"),
        "kd": made("kd"),
        "geometric": made("geometric"),
        "geometric, contrast": made("geometric", form="contrast"),
        "kd, geometric": made("combined", methods=["kd", "geometric"]),
        "kd, geometric, contrast": made("combined", methods=["kd", contrast]),
    }
    yield from students(rows, seed, only, few(TENTH))


def about_geometric(rows: Rows) -> str:
    said = [rows.says(row, base) for row, base in (
        ("geometric", "scratch"), ("geometric, contrast", "scratch"), ("kd, geometric", "kd"),
        ("kd, geometric, contrast", "kd"),
    )]  # fmt: skip
    return f"{setting(rows, few(TENTH))} The images are a tenth.\n\n{compared(rows)}\n\n{'; '.join(said)}."


class MeanTargets(OnlinePeers):
    """Without attention: every peer learns from the mean of all."""

    def attention(self, features: Tensor) -> Tensor:
        peers = features.shape[1]
        return features.new_full((len(features), peers, peers), 1 / peers)


def peers(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """A leader of peers without a teacher, with attention and without."""
    rows = {"scratch": made("scratch"), "kd": made("kd"), "online_peers": made("online_peers"),
            "online_peers, mean targets": MeanTargets()}  # fmt: skip

    def of_the_peers(student: nn.Module, method: Method) -> Result:
        if not isinstance(method, OnlinePeers):
            return {}
        test = few(IMAGES).test
        answers = sum(distill.predict(peer, test, few(IMAGES)) for peer in method.peers)
        return {"peers": 100 * float((np.asarray(answers).argmax(1) == test.labels).mean())}

    yield from students(rows, seed, only, few(IMAGES), about=of_the_peers)


def about_peers(rows: Rows) -> str:
    with_attention, without = (
        rows.mean(row, "last_train_diversity", 3) for row in ("online_peers", "online_peers, mean targets")
    )
    table_ = compared(rows, **{"mean of the peers": "peers"})
    return (
        f"{setting(rows, few(IMAGES))}\n\n{table_}\n\n{rows.says('online_peers', 'scratch')}."
        f" The peers' mean distance from each other in the last epoch is {with_attention} with attention, {without}"
        " with the mean as everybody's target (the first was expected to be larger)."
    )


def temperature(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """A temperature that falls against one that stays."""
    rows = {"scratch": made("scratch")}
    rows |= {"kd" if one == 4 else f"kd, temperature {one:g}": made("kd", temperature=one) for one in TEMPERATURES}
    rows |= {f"kd, {name}": made("kd", temperature=curve) for name, curve in FALLING.items()}
    yield from students(rows, seed, only, few(IMAGES))


def about_temperature(rows: Rows) -> str:
    falling = [f"kd, {name}" for name in FALLING]
    still = [row for row in rows.students() if row not in (*falling, "scratch")]
    best, fixed = (max(these, key=lambda row: statistics.mean(rows.values(row))) for these in (falling, still))
    return (
        f"{setting(rows, few(IMAGES))} `kd` has temperature 4.\n\n{compared(rows)}\n\n"
        f"{rows.says(best, fixed, -0.2)}: the best that falls, and the best that stays."
    )


def scales(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """Methods that are far below kd, with the weights of their papers and with weights nearer to the labels' loss."""
    rows = {name: made(name) for name in ("scratch", "kd", "ard", "attention", "dist", "dkd", "rkd")}
    rows |= {
        "ard, KL summed, temperature 4": made("ard", kl_reduction="batchmean", temperature=4.0),
        "attention, weight 30": made("attention", weight=30.0),
        "dist, beta and gamma 0.5": made("dist", beta=0.5, gamma=0.5),
        "dkd, beta 1": made("dkd", beta=1.0),
        "rkd, a third of the weights": made("rkd", distance_weight=8.0, angle_weight=16.0),
    }
    yield from students(rows, seed, only, few(IMAGES))


def about_scales(rows: Rows) -> str:
    return (
        f"{setting(rows, few(IMAGES))} The defaults are the papers' weights, for longer trainings on larger images; the"
        f" other weights were chosen after a look at one seed, on the test images.\n\n{compared(rows)}"
    )


def sensor(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """A teacher of the old sensor, a student of the new one, and few pairs of images that are labelled."""
    pairs = data.load("digit_sensors", {})
    old = seeing(0, TEACHER)
    of = network(old, pairs, seed, "sensor")
    fit(of, pairs, TEACHER_BUDGET, made("scratch"), None, seed)
    yield {"row": "teacher, old sensor", "top1": accuracy(of, pairs)}
    rows: dict[str, tuple[Method, int]] = {}
    for number in PAIRS:
        named = {"scratch": made("scratch")} | {row: made("kd", **options) for row, options in SENSOR_ROWS.items()}
        rows |= {f"{row}, {number}": (method, number) for row, method in named.items()}
    rows[ALL_PAIRS] = (made("kd", kd_weight=1.0, ce_weight=0.0), len(pairs.train))
    for row, (method, number) in rows.items():
        if not only or row in only:
            dataset = first(pairs, number)
            if method.needs_target:
                dataset = replace(dataset, target=Domain(pairs.name, pairs.train.images, pairs.test))
            batch = min(number, 32)
            budget = BUDGET.model_copy(update={"epochs": round(STEPS / (number // batch)), "batch_size": batch})
            student = network(seeing(1, STUDENT), dataset, seed, "sensor")
            fit(student, dataset, budget, method, of.requires_grad_(False), seed)
            yield {"row": row, "is_student": True, "top1": accuracy(student, dataset)}


def seeing(channel: int, of: dict[str, Any]) -> dict[str, Any]:
    """The options of a ResNet that sees one of the sensors."""
    return {"channels": [channel], "of": {"network": "resnet", **of}}


def first(dataset: Dataset, number: int) -> Dataset:
    """With so many training samples, of all classes alike."""
    labels = dataset.train.labels
    within = np.array([(labels[:place] == label).sum() for place, label in enumerate(labels)])
    return replace(dataset, train=dataset.train[np.sort(np.lexsort((labels, within))[:number])])


def about_sensor(rows: Rows) -> str:
    def shown(row: str, number: int) -> str:
        return rows.mean(f"{row}, {number}")

    lines = [[row, *(shown(row, number) for number in PAIRS)] for row in ("scratch", *SENSOR_ROWS)]
    said = []
    for number in PAIRS:
        best = max(
            (row for row in SENSOR_ROWS if row not in ("kd", THE_REST)),
            key=lambda row: statistics.mean(rows.values(f"{row}, {number}")),
        )
        kd = f"kd, {number}"
        said += [rows.says(kd, f"scratch, {number}"), rows.says(f"{best}, {number}", kd)]
        said += [rows.says(f"{THE_REST}, {number}", kd)]
    return (
        f"Digits as two sensors see them, as in the recipe digits-sensor: {len(rows.seeds)} seeds, accuracy in percent"
        f" of {len(many().test)} test images, mean ± standard deviation. The teacher, a ResNet-14 of half the width,"
        f" has seen all images of the old sensor, {rows.mean('teacher, old sensor')}; the student, a ResNet-8, sees the"
        f" new one alone, which is coarse and noisy, and learns for {STEPS} steps from so many labelled pairs of"
        " images. `kd` has weight 0.9, and the others are kd too: annealed, selective, and with"
        " as many pairs again in every step whose labels are not used, drawn from all.\n\n"
        + table(["labelled pairs", *map(str, PAIRS)], lines)
        + f"\n\n{'; '.join(said)}; the second of each number of pairs is the best that is annealed or"
        " selective. All"
        f" {len(data.load('digit_sensors', {}).train)} pairs without a label, as long, reach {rows.mean(ALL_PAIRS)}:"
        f" {rows.says(ALL_PAIRS, f'scratch, {PAIRS[0]}')}, which is where the paper has .77 against .37."
    )


def decorrelation(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """How correlated a student's channels are, and its components, on training images and on others."""
    dataset, student = few(IMAGES), network(STUDENT, few(IMAGES), seed)
    fit(student, dataset, BUDGET, made("kd"), teacher(seed), seed)
    x, y = torch.from_numpy(dataset.normalized("train")), torch.from_numpy(dataset.train.labels)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    method = DecorrelatedPrune()
    method.attach(student, None, Setting(x[:2], y, dataset.num_classes, mean, std, 1, lambda n: x[:n]))
    method(Step(x, y, progress=method.prune_at, student=student, teacher=lambda: student(x)))
    found: dict[str, list[float]] = {}
    for images in ("train", "test"):
        given = outputs(student, [*method._convs], torch.from_numpy(dataset.normalized(images)))
        for number, values in enumerate(given):
            turned = values @ method._spectrum("out", number).vectors
            for kind, one in (("channels", values), ("components", turned)):
                found.setdefault(f"{kind}, {images}", []).append(correlated(one))
    for row, shares in found.items():
        yield {"row": row, "share": statistics.mean(shares)}


def outputs(network: nn.Module, paths: Sequence[str], x: Tensor) -> list[Tensor]:
    """What the modules give, as [samples and sites, C] in float64."""
    with evaluating(network), torch.no_grad(), Taps(network, paths, "student").recording() as seen:
        network(x)
    return [seen[path].double().movedim(1, -1).flatten(0, -2) for path in paths]


def correlated(values: Tensor) -> float:
    """The sum of the absolute covariances of different columns, over the sum of the variances."""
    covariance = values.T.cov()
    variances = covariance.diagonal().sum()
    return float((covariance.abs().sum() - variances) / variances)


def about_decorrelation(rows: Rows) -> str:
    lines = [
        [kind, *(rows.mean(f"{kind}, {images}", "share", 4) for images in ("train", "test"))]
        for kind in ("channels", "components")
    ]
    return (
        f"Of the outputs of all convolutions of a student that kd has trained ({IMAGES} labelled digits,"
        f" {BUDGET.epochs} epochs, {len(rows.seeds)} seeds): the sum of the absolute covariances of two different"
        " channels, or components, over the sum of the variances. Components are those that decorrelated_prune finds on"
        " the training images; what pruning them costs is told under `pruning.py`.\n\n"
        + table(["", "training images", "test images"], lines)
    )


STUDIES = {
    "dense_flow": Study("Dense flow against discriminators (`dense_flow`)", dense_flow, about_dense_flow),
    "geometric": Study("Neighbourhoods with a tenth of the labels (`geometric`)", geometric, about_geometric),
    "peers": Study("Peers with attention and without (`online_peers`)", peers, about_peers),
    "temperature": Study("A temperature that falls (`kd`)", temperature, about_temperature),
    "scales": Study("Published weights, and smaller ones", scales, about_scales),
    "sensor": Study("A new sensor with few labels (`kd`)", sensor, about_sensor),
    "decorrelation": Study("Channels and components (`decorrelated_prune`)", decorrelation, about_decorrelation),
}

if __name__ == "__main__":
    command(__doc__ or "", "checks", STUDIES)
