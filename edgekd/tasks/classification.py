"""Classification: which of K classes an image shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgekd.registry import register
from edgekd.tasks import Array, Metric, Part, Task, class_numbers

if TYPE_CHECKING:
    from torch import Tensor


@register("task", "classification")
class Classification(Task):
    """Which of K classes an image shows: labels are class numbers [N], answers logits [N, K], the score is top-1."""

    name = "classification"
    metric = Metric("top1", "Top-1")
    agree = "share of samples for which both name the same class"

    def names(self, labels: Array) -> tuple[str, ...]:
        """ "0", "1", ..."""
        return class_numbers.named(labels)

    def check(self, part: Part, names: tuple[str, ...]) -> None:
        """One class number per image."""
        class_numbers.check(part, names)

    def check_against_train(self, purpose: str, part: Part, train: Part, names: tuple[str, ...]) -> None:
        """No class that train has not; and train has two at least."""
        class_numbers.check_several(train, names)
        class_numbers.check_against_train(purpose, part, train, names)

    def stored(self, labels: Array) -> npt.NDArray[np.int64]:
        """int64 [N]."""
        return labels.astype(np.int64)

    def notes(self, train: Part, names: tuple[str, ...]) -> list[str]:
        """Classes without a training sample."""
        return class_numbers.notes(train, names)

    def strata(self, labels: Array) -> npt.NDArray[np.int64]:
        """The classes."""
        return labels

    def counts(self, labels: Array, names: tuple[str, ...]) -> dict[str, int]:
        """Samples by class."""
        return class_numbers.counts(labels, names)

    def output_shape(self, names: tuple[str, ...], image: tuple[int, ...]) -> tuple[int, ...]:
        """(K,)."""
        return (len(names),)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        from torch.nn import functional as F

        return F.cross_entropy(outputs, labels)

    def batch_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Top-1."""
        return (outputs.argmax(1) == labels).float().mean()

    def quality(self, outputs: Array, labels: Array) -> Array:
        """bool [N]: whether the largest logit is that of the class."""
        return np.asarray(outputs.argmax(1) == labels)

    def agreement(self, first: Array, second: Array) -> float:
        """Share of samples whose largest logit is that of the same class."""
        return float((first.argmax(1) == second.argmax(1)).mean())

    def by_class(self, outputs: Array, labels: Array, names: tuple[str, ...]) -> list[tuple[int, float | None]]:
        """Recall."""
        return class_numbers.shares(self.quality(outputs, labels), labels, names)
