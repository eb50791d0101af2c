"""Embedding: images of one class lie close together, so that one can be found by another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgekd.errors import RecipeError
from edgekd.registry import register
from edgekd.tasks import Array, Metric, Part, Task, class_numbers

if TYPE_CHECKING:
    from torch import Tensor

# Samples whose neighbours are looked for together: the table of similarities to all others stays small.
ROWS = 1024


@register("task", "embedding")
class Embedding(Task):
    """Images of a class lie close: labels are class numbers [N], answers points [N, D], the score is recall@1.

    dimension: D. temperature: of the loss; lower looks harder at the closest of other classes.
    Only directions count: points are compared by their cosine. Every sample of a split asks for its nearest neighbour
    among all others of that split, which is right when it is of the same class.
    """

    name = "embedding"
    metric = Metric("recall@1", "Recall@1")
    agree = "share of samples that have the same nearest neighbour"

    def __init__(self, *, dimension: int = 32, temperature: float = 0.1) -> None:
        self.dimension, self.temperature = dimension, temperature
        if dimension < 2 or temperature <= 0:
            raise RecipeError(
                f"data.task.embedding: dimension = {dimension} and temperature = {temperature:g} make no embedding",
                allowed="expected: a dimension of 2 at least, a temperature above 0",
                fix="set dimension to 32, and temperature to 0.1",
                key="data.task",
            )

    def names(self, labels: Array) -> tuple[str, ...]:
        """Their numbers."""
        return class_numbers.named(labels)

    def check(self, part: Part, names: tuple[str, ...]) -> None:
        """One class number per image."""
        class_numbers.check(part, names)

    def check_against_train(self, purpose: str, part: Part, train: Part, names: tuple[str, ...]) -> None:
        """Train has two classes at least. Others may have classes of their own: that is what embeddings are for."""
        del purpose, part
        class_numbers.check_several(train, names)

    def stored(self, labels: Array) -> npt.NDArray[np.int64]:
        """int64 [N]."""
        return labels.astype(np.int64)

    def strata(self, labels: Array) -> npt.NDArray[np.int64]:
        """The classes."""
        return labels

    def counts(self, labels: Array, names: tuple[str, ...]) -> dict[str, int]:
        """Samples by class."""
        return class_numbers.counts(labels, names)

    def output_shape(self, names: tuple[str, ...], image: tuple[int, ...]) -> tuple[int, ...]:
        """(D,)."""
        return (self.dimension,)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Supervised contrastive loss (P. Khosla et al., NeurIPS 2020, eq. 2), of samples that are not alone in theirs.

        Where none is, the batch has nothing to teach, and the loss is 0.
        """
        from torch.nn import functional as F

        points = F.normalize(outputs, dim=1)
        myself = F.one_hot(labels.new_tensor(range(len(labels))), len(labels)).bool()
        near = (points @ points.T / self.temperature).masked_fill(myself, -1e9).log_softmax(1)
        same = (labels[:, None] == labels) & ~myself
        partners = same.sum(1)
        each = -(near * same).sum(1) / partners.clamp(min=1)
        return (each * (partners > 0)).sum() / (partners > 0).sum().clamp(min=1)

    def batch_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Recall@1 within the batch."""
        from torch.nn import functional as F

        points = F.normalize(outputs, dim=1)
        near = (points @ points.T).fill_diagonal_(-2)
        return (labels[near.argmax(1)] == labels).float().mean()

    def quality(self, outputs: Array, labels: Array) -> Array:
        """bool [N]: whether the nearest neighbour is of the same class."""
        return np.asarray(labels[self._neighbours(outputs)] == labels)

    def agreement(self, first: Array, second: Array) -> float:
        """Share of samples that have the same nearest neighbour."""
        return float((self._neighbours(first) == self._neighbours(second)).mean())

    def by_class(self, outputs: Array, labels: Array, names: tuple[str, ...]) -> list[tuple[int, float | None]]:
        """Recall@1 of the samples of each class."""
        return class_numbers.shares(self.quality(outputs, labels), labels, names)

    @staticmethod
    def _neighbours(outputs: Array) -> npt.NDArray[np.int64]:
        """[N]: for each point [N, D] the other one with the largest cosine, the first among equals."""
        points = outputs.astype(np.float64)
        points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)

        def found() -> Iterator[npt.NDArray[np.int64]]:
            for start in range(0, len(points), ROWS):
                near = points[start : start + ROWS] @ points.T
                rows = np.arange(len(near))
                near[rows, rows + start] = -2.0
                yield near.argmax(1)

        return np.concatenate(list(found()))
