"""What a network is asked for: the task of a data set, and all that follows from it.

A task says what labels are, what shape the answers have, what is minimised, and how good answers are: one number, the
score, which is the mean of one number per sample, so that two networks can be compared sample by sample. Everything
else asks the task and never which one it is.

numpy only; torch is imported where a loss is asked for. An `Array` is numpy's, a `Tensor` torch's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt

from edgekd import stats
from edgekd.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
# Answers are float32: a difference of two scores below this is rounding.
ROUNDING = 1e-6


class Part(Protocol):
    """One part of a source as it was read: its labels [N, ...], of images [N, C, ...]; file and where(i) for errors."""

    @property
    def images(self) -> npt.NDArray[np.uint8]:
        """[N, C, ...]."""

    @property
    def labels(self) -> Array:
        """[N, ...], as they were read."""

    @property
    def file(self) -> Path:
        """The file or folder of the whole part."""

    @property
    def where(self) -> Callable[[int], str]:
        """The file and place of sample i."""


@dataclass(frozen=True)
class Metric:
    """What a score is: its name in manifests, its label for readers, its unit, and which way is better.

    share: it lies between 0 and 1, and differences are told in points; it has no unit then.
    """

    name: str
    label: str
    higher_is_better: bool = True
    share: bool = True
    unit: str = ""

    def goodness(self, score: float) -> float:
        """The score with the sign that makes more of it better."""
        return score if self.higher_is_better else -score

    def gain(self, score: float) -> float:
        """A number that rises as the score gets better, by 0.001 for the least gain that counts: 0.1 points of a share,
        a thousandth of anything else."""
        return self.goodness(score) if self.share else self.goodness(float(np.log(max(abs(score), 1e-300))))

    def text(self, score: float) -> str:
        """For a line of progress: `top1 97.2%`, `mae 1.21 years`."""
        return f"{self.name} {score:.1%}" if self.share else f"{self.name} {score:.3g} {self.unit}".strip()


class Task(ABC):
    """What labels are, what answers are, and how good these are. Options are kept under their own names.

    Shapes: N samples; `outputs` are the network's answers [N, *output_shape], float32; labels are as `stored` makes
    them.
    """

    name: ClassVar[str]
    metric: Metric
    # How far two networks agree, for readers.
    agree: ClassVar[str]
    # Whether labels and answers are maps on the pixels, which move with the image.
    per_pixel: ClassVar[bool] = False
    # What softens answers in distillation, where the recipe does not say.
    kd_temperature: ClassVar[float] = 4.0

    @property
    def choice(self) -> dict[str, dict[str, Any]]:
        """{name: options}, from which the registry makes it again."""
        return {self.name: {key: value for key, value in vars(self).items() if key != "metric"}}

    # ------------------------------------------------------------ labels

    @abstractmethod
    def names(self, labels: Array) -> tuple[str, ...]:
        """What the classes are called where the source has no names for them."""

    @abstractmethod
    def check(self, part: Part, names: tuple[str, ...]) -> None:
        """Raise DataError for labels that cannot be meant. names: of the source; empty where it has none."""

    @abstractmethod
    def check_against_train(self, purpose: str, part: Part, train: Part, names: tuple[str, ...]) -> None:
        """Raise DataError for labels of another part that no network learns from those of train."""

    def fitted(self, labels: Array) -> Self:
        """The task with what it has to know of the training labels, as they were read."""
        del labels
        return self

    @abstractmethod
    def stored(self, labels: Array) -> Array:
        """Labels that `check` let pass, in the type that the other methods and training take."""

    def notes(self, train: Part, names: tuple[str, ...]) -> list[str]:
        """What is odd about the labels, but not wrong; as sentences without a period."""
        del train, names
        return []

    @abstractmethod
    def strata(self, labels: Array) -> npt.NDArray[np.int64]:
        """[N]: the groups that keep their shares when samples are split."""

    @abstractmethod
    def counts(self, labels: Array, names: tuple[str, ...]) -> dict[str, int]:
        """How many samples there are of each class, by name; empty where there are no classes."""

    @abstractmethod
    def output_shape(self, names: tuple[str, ...], image: tuple[int, ...]) -> tuple[int, ...]:
        """Of the answer to one image [C, ...]: how many numbers, and the map they are on, if any."""

    # ------------------------------------------------------------ training

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """What is minimised without a teacher: a scalar, the mean over the batch."""

    def joint_divergence(self, outputs: Tensor, teacher: Tensor) -> Tensor | None:
        """How far the answers of a batch, taken together, are from a teacher's: a scalar, 0 where they are equal.

        None where the loss has no part that looks at answers together, so that a divergence of each says it all.
        """
        del outputs, teacher
        return None

    @abstractmethod
    def batch_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The score of a batch, where it lies: a scalar without gradient."""

    # ------------------------------------------------------------ measuring

    @abstractmethod
    def quality(self, outputs: Array, labels: Array) -> Array:
        """[N]: bool where an answer is right or wrong, else a float64 of which the score is the mean."""

    @abstractmethod
    def agreement(self, first: Array, second: Array) -> float:
        """From 0 to 1, how far two networks give the same answers [N, ...] for the same samples."""

    def also(self, outputs: Array, labels: Array) -> dict[str, float]:
        """Other measures of the same answers that readers know, by label; no choice is made by them."""
        del outputs, labels
        return {}

    def by_class(self, outputs: Array, labels: Array, names: tuple[str, ...]) -> list[tuple[int, float | None]]:
        """For each class how many samples it has and its score, None without samples; empty without classes."""
        del outputs, labels, names
        return []

    def score(self, outputs: Array, labels: Array) -> float:
        """How good the answers are."""
        return float(self.quality(outputs, labels).mean())

    def measured(self, outputs: Array, labels: Array) -> dict[str, Any]:
        """The score with its interval, as manifests hold it: score, n, ci95."""
        return summary(self.quality(outputs, labels))

    def about_outputs(self) -> dict[str, str]:
        """What the user of an ONNX file has to know to read the answers, by names of metadata."""
        return {}

    def described(self) -> dict[str, Any]:
        """What a manifest says of it: task, metric, agree."""
        return {"task": self.choice, "metric": asdict(self.metric), "agree": self.agree}


@dataclass(frozen=True, eq=False)
class Judge:
    """A task with the labels that answers [N, *outputs] are held against."""

    task: Task
    labels: Array
    outputs: tuple[int, ...]

    def score(self, outputs: Array) -> float:
        """How good the answers are."""
        return self.task.score(outputs, self.labels)

    def goodness(self, score: float) -> float:
        """The score with the sign that makes more of it better."""
        return self.task.metric.goodness(score)


def summary(quality: Array) -> dict[str, Any]:
    """Of `Task.quality` [N], as manifests hold it: score, n, ci95."""
    return {"score": float(quality.mean()), "n": len(quality), "ci95": list(_interval(quality))}


def _interval(quality: Array) -> stats.Interval:
    """95 % interval of the mean of `quality` [N]: Wilson's for right and wrong, else by bootstrap."""
    if quality.dtype == bool:
        return stats.wilson(int(quality.sum()), len(quality))
    return stats.mean_interval(quality)


def change(first: Array, second: Array) -> dict[str, Any]:
    """The second network's score minus the first's, from their `quality` [N] of the same samples.

    Returns value, ci95, p_value and test, the name of what gave it: McNemar's for right and wrong, else random signs of
    the differences.
    """
    if first.dtype == bool:
        value, ci95 = stats.paired_difference(first, second)
        p_value = stats.mcnemar_p(int((first & ~second).sum()), int((second & ~first).sum()))
        return {"value": value, "ci95": list(ci95), "p_value": p_value, "test": "McNemar"}
    difference = second - first
    return {
        "value": float(difference.mean()), "ci95": list(stats.mean_interval(difference)),
        "p_value": stats.sign_flip_p(difference), "test": "sign flips",
    }  # fmt: skip


def one_per_image(part: Part, allowed: str) -> None:
    """Raise DataError unless there are as many labels as images."""
    if len(part.labels) != len(part.images):
        raise DataError(
            f"{part.file}: {len(part.images)} images, but labels of shape {list(part.labels.shape)}",
            allowed=f"expected: {allowed}",
            fix="make the file anew; it may be cut short",
        )
