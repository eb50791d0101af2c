"""Regression: real values to be estimated, such as an age."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from edgekd.errors import DataError, RecipeError
from edgekd.registry import register
from edgekd.tasks import Array, Metric, Part, Task, one_per_image

if TYPE_CHECKING:
    from torch import Tensor

# Samples are split so that each tenth of the values keeps its share.
QUANTILES = np.arange(1, 10) / 10


@register("task", "regression")
class Regression(Task):
    """Real values: labels are [N] or [N, D] numbers of one unit, answers [N, D], the score is the mean absolute error.

    unit: of the values, for readers. low, high: answers are cut to this range, in training too.
    center, scale: a network answers with (value - center) / scale, so that any values are learned alike; null measures
    mean and standard deviation on train.
    """

    name = "regression"
    agree = "concordance of the values, 1 where both give the same (Lin 1989)"

    def __init__(
        self, *, unit: str = "", low: float | None = None, high: float | None = None, center: float | None = None,
        scale: float | None = None,
    ) -> None:  # fmt: skip
        self.unit, self.low, self.high, self.center, self.scale = unit, low, high, center, scale
        self.metric = Metric("mae", "MAE", higher_is_better=False, share=False, unit=unit)
        if low is not None and high is not None and low >= high:
            raise RecipeError(
                f"data.task.regression: low = {low:g} is not below high = {high:g}",
                allowed="expected: the range of the values, or null for an open end",
                fix=f"set high above {low:g}",
                key="data.task",
            )
        if scale is not None and scale <= 0:
            raise RecipeError(
                f"data.task.regression.scale = {scale:g} is not valid",
                allowed="expected: above 0",
                fix="leave it out to have it measured",
                key="data.task",
            )

    def names(self, labels: Array) -> tuple[str, ...]:
        """ "value", or "value 0", "value 1", ... where there are several."""
        count = 1 if labels.ndim == 1 else labels.shape[1]
        return ("value",) if count == 1 else tuple(f"value {number}" for number in range(count))

    def check(self, part: Part, names: tuple[str, ...]) -> None:
        """Numbers, as many for each image as there are names, all finite."""
        one_per_image(part, "a value, or a row of values, per image")
        labels, count = part.labels, len(names) or None
        if labels.dtype.kind not in "iuf" or labels.ndim > 2 or (count or labels[:1].size) != labels[:1].size:
            raise DataError(
                f"{part.file}: the labels are {labels.dtype} {list(labels.shape)}",
                allowed=f"expected: numbers [N] or [N, {count or 'D'}], what is to be estimated",
                fix="save them as float32",
            )
        bad = np.flatnonzero(~np.isfinite(labels.reshape(len(labels), -1)).all(1))
        if len(bad):
            raise DataError(
                f"{part.where(int(bad[0]))}: the label is NaN or infinite, and {len(bad) - 1} more are",
                allowed="expected: finite numbers",
                fix="correct these labels, or take the images out",
            )

    def check_against_train(self, purpose: str, part: Part, train: Part, names: tuple[str, ...]) -> None:
        """As many values in every part, and more than one of each in train."""
        del names
        if part.labels[:1].size != train.labels[:1].size:
            raise DataError(
                f"{part.file}: {part.labels[:1].size} values per image in {purpose}, {train.labels[:1].size} in train",
                allowed="expected: as many in every part",
                fix="make all parts the same way",
            )
        if (train.labels == train.labels[:1]).all():
            raise DataError(
                f"{train.file}: all {len(train.labels)} training samples have the value {train.labels.flat[0]:g}",
                allowed="expected: values that differ",
                fix="add samples of other values",
            )

    def fitted(self, labels: Array) -> Self:
        """With center and scale of the training labels, where the user gives none."""
        fitted = copy.copy(self)
        values = labels.astype(np.float64)
        fitted.center = float(values.mean()) if self.center is None else self.center
        fitted.scale = float(values.std()) if self.scale is None else self.scale
        return fitted

    def stored(self, labels: Array) -> Array:
        """float32 [N, D], (value - center) / scale."""
        center, scale = self._units()
        return ((labels.reshape(len(labels), -1).astype(np.float64) - center) / scale).astype(np.float32)

    def values(self, stored: Array) -> Array:
        """Labels or answers [N, D] in the user's unit, cut to the range of the values."""
        center, scale = self._units()
        low, high = (-np.inf if self.low is None else self.low), (np.inf if self.high is None else self.high)
        return np.clip(stored.astype(np.float64) * scale + center, low, high)

    def strata(self, labels: Array) -> npt.NDArray[np.int64]:
        """The tenth in which the first value lies."""
        first = labels[:, 0]
        return np.searchsorted(np.quantile(first, QUANTILES), first).astype(np.int64)

    def counts(self, labels: Array, names: tuple[str, ...]) -> dict[str, int]:
        """Nothing: there are no classes."""
        del labels, names
        return {}

    def output_shape(self, names: tuple[str, ...], image: tuple[int, ...]) -> tuple[int, ...]:
        """(D,)."""
        return (len(names),)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error of (value - center) / scale, of answers cut to the range."""
        from torch.nn import functional as F

        return F.mse_loss(self.cut(outputs), labels)

    def cut(self, outputs: Tensor) -> Tensor:
        """Answers [B, D] cut to the range of the values."""
        center, scale = self._units()
        if self.low is None and self.high is None:
            return outputs
        low, high = (None if end is None else (end - center) / scale for end in (self.low, self.high))
        return outputs.clamp(low, high)

    def batch_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """MAE in the user's unit."""
        return (self.cut(outputs) - labels).abs().mean() * self._units()[1]

    def quality(self, outputs: Array, labels: Array) -> Array:
        """float64 [N]: the absolute error in the user's unit, the mean over D."""
        return np.asarray(np.abs(self.values(outputs) - self.values(labels)).mean(1))

    def agreement(self, first: Array, second: Array) -> float:
        """Concordance correlation of the values, 0 where it is negative (L. I-K. Lin, Biometrics 1989)."""
        x, y = self.values(first).ravel(), self.values(second).ravel()
        spread = x.var() + y.var() + (x.mean() - y.mean()) ** 2
        return float(max(0.0, 2 * ((x - x.mean()) * (y - y.mean())).mean() / spread)) if spread else 1.0

    def about_outputs(self) -> dict[str, str]:
        """How an answer becomes a value."""
        center, scale = self._units()
        return {"postprocessing": f"value = {center!r} + {scale!r} * output", "unit": self.unit}

    def _units(self) -> tuple[float, float]:
        assert self.center is not None and self.scale is not None, "the data has been read: the task is fitted"
        return self.center, self.scale
