"""Segmentation: what every pixel of an image, or voxel of a volume, belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgekd.errors import DataError
from edgekd.registry import register
from edgekd.tasks import Array, Metric, Part, Task, class_numbers, one_per_image

if TYPE_CHECKING:
    from torch import Tensor

# A pixel of this label is of no known class: it is neither learned nor scored (as in PASCAL VOC).
IGNORED = 255


@register("task", "segmentation")
class Segmentation(Task):
    """The class of every pixel: labels are class numbers [N, H, W], answers logits [N, K, H, W], the score is Dice.

    The same for volumes, [N, D, H, W]. The Dice of a sample is the mean over the classes that are in its labels or in
    its answer, without class 0, the background (L. R. Dice, Ecology 1945); 1 where there are none. Pixels of label 255
    do not count.
    """

    name = "segmentation"
    metric = Metric("dice", "Dice")
    per_pixel = True
    # Most pixels are background, of which a teacher is sure: softened, their logits outweigh what the classes are.
    kd_temperature = 1.0
    agree = "share of pixels for which both name the same class"

    def names(self, labels: Array) -> tuple[str, ...]:
        """Their numbers."""
        return class_numbers.named(labels[labels != IGNORED])

    def check(self, part: Part, names: tuple[str, ...]) -> None:
        """A class number for every pixel."""
        one_per_image(part, "a map of class numbers per image")
        size = part.images.shape[2:]
        if part.labels.shape[1:] != size or part.labels.dtype.kind not in "iu":
            raise DataError(
                f"{part.file}: labels {part.labels.dtype} {list(part.labels.shape)} for images of"
                f" {'x'.join(map(str, size))}",
                allowed=f"expected: integers {['N', *size]}, the class of every pixel, 0 for the background",
                fix="save the masks as uint8 in the images' size",
            )
        numbers = np.where(part.labels == IGNORED, 0, part.labels).reshape(len(part.labels), -1)
        limit = len(names) or IGNORED
        worst = np.where((numbers < 0).any(1), numbers.min(1), numbers.max(1))
        class_numbers.in_range(worst, limit, part.where, names)

    def check_against_train(self, purpose: str, part: Part, train: Part, names: tuple[str, ...]) -> None:
        """No class that train has not; and train has two at least."""
        seen = np.unique(train.labels[train.labels != IGNORED])
        if len(seen) < 2:
            raise DataError(
                f"{train.file}: all pixels of the training images are of one class",
                allowed="expected: a background and one class at least",
                fix="check the masks",
            )
        known = np.isin(part.labels, [*seen, IGNORED])
        alien = np.flatnonzero(~known.reshape(len(known), -1).all(1))
        if len(alien):
            raise DataError(
                f"{part.where(int(alien[0]))}: class {part.labels[~known][0]} is in the {purpose} part only",
                allowed=f"expected: one of the {len(seen)} classes of {train.file}",
                fix=f"add training samples of it, or take it out of the {purpose} part",
            )

    def stored(self, labels: Array) -> npt.NDArray[np.uint8]:
        """uint8 [N, H, W]."""
        return labels.astype(np.uint8)

    def strata(self, labels: Array) -> npt.NDArray[np.int64]:
        """The class, other than background, that most of a sample's pixels have; 0 where there is none."""
        flat = labels.reshape(len(labels), -1)
        sizes = np.stack([(flat == k).sum(1) for k in range(1, int(flat[flat != IGNORED].max(initial=1)) + 1)], 1)
        return np.where(sizes.any(1), sizes.argmax(1) + 1, 0).astype(np.int64)

    def counts(self, labels: Array, names: tuple[str, ...]) -> dict[str, int]:
        """How many samples have pixels of each class."""
        flat = labels.reshape(len(labels), -1)
        return {name: int((flat == k).any(1).sum()) for k, name in enumerate(names)}

    def output_shape(self, names: tuple[str, ...], image: tuple[int, ...]) -> tuple[int, ...]:
        """(K, H, W)."""
        return (len(names), *image[1:])

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy plus 1 - soft Dice of the batch (F. Isensee et al., "nnU-Net", Nature Methods 2021)."""
        from torch.nn import functional as F

        labels = labels.long()
        inside, overlap, sizes = self._overlaps(outputs.softmax(1), labels)
        dice = (2 * overlap.sum(0) + 1) / (sizes.sum(0) + 1)
        entropy = F.cross_entropy(outputs, labels, ignore_index=IGNORED, reduction="sum") / inside.sum().clamp(min=1)
        return entropy + 1 - dice.mean()

    def joint_divergence(self, outputs: Tensor, teacher: Tensor) -> Tensor:
        """1 - soft Dice of both networks' probabilities, without background: beside the divergence of every pixel what
        Dice is beside cross-entropy. With squared sizes, so that it ends at 0 (F. Milletari et al., 3DV 2016, eq. 3).
        """
        own, wanted = (logits.softmax(1)[:, 1:].movedim(1, 0).flatten(1) for logits in (outputs, teacher))
        overlap, sizes = (own * wanted).sum(1), (own.square() + wanted.square()).sum(1)
        return 1 - ((2 * overlap + 1) / (sizes + 1)).mean()

    def batch_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Dice."""
        from torch.nn import functional as F

        named = F.one_hot(outputs.argmax(1), outputs.shape[1]).movedim(-1, 1).float()
        _, overlap, sizes = self._overlaps(named, labels.long())
        there = sizes > 0
        dice = (2 * overlap / sizes.clamp(min=1) * there).sum(1) / there.sum(1).clamp(min=1)
        return dice.where(there.any(1), dice.new_ones(())).mean()

    @staticmethod
    def _overlaps(shares: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of shares [B, K, ...] of the classes and labels [B, ...]: which pixels count, [B, 1, ...]; for every class
        but background the overlap and both sizes together, [B, K - 1]."""
        from torch.nn import functional as F

        inside = (labels != IGNORED).unsqueeze(1)
        right = F.one_hot(labels.where(inside[:, 0], labels.new_zeros(())), shares.shape[1]).movedim(-1, 1)
        right, shares = (values[:, 1:] * inside for values in (right, shares))
        overlap, sizes = (values.flatten(2).sum(2) for values in (right * shares, right + shares))
        return inside, overlap, sizes

    def quality(self, outputs: Array, labels: Array) -> Array:
        """float64 [N]: Dice."""
        dice = self._dice(outputs, labels)[:, 1:]
        there = ~np.isnan(dice)
        mean = np.where(there, dice, 0.0).sum(1) / np.maximum(1, there.sum(1))
        return np.where(there.any(1), mean, 1.0)

    @staticmethod
    def _dice(outputs: Array, labels: Array) -> npt.NDArray[np.float64]:
        """[N, K]: the Dice of every class in every sample, NaN where it is in neither."""
        n, k = outputs.shape[:2]
        named, right = outputs.argmax(1).reshape(n, -1), labels.reshape(n, -1)
        inside = right != IGNORED
        found = np.full((n, k), np.nan)
        for number in range(k):
            a, b = (named == number) & inside, right == number
            sizes = a.sum(1) + b.sum(1)
            np.divide(2.0 * (a & b).sum(1), sizes, out=found[:, number], where=sizes > 0)
        return found

    def also(self, outputs: Array, labels: Array) -> dict[str, float]:
        """mIoU: intersection over union of each class on all pixels together, the mean over the classes that occur."""
        inside, k = labels != IGNORED, outputs.shape[1]
        pairs = np.bincount(labels[inside].astype(np.int64) * k + outputs.argmax(1)[inside], minlength=k * k)
        table = pairs.reshape(k, k)
        union = table.sum(0) + table.sum(1) - np.diag(table)
        return {"mIoU": float((np.diag(table)[union > 0] / union[union > 0]).mean())}

    def agreement(self, first: Array, second: Array) -> float:
        """Share of pixels for which both name the same class."""
        return float((first.argmax(1) == second.argmax(1)).mean())

    def by_class(self, outputs: Array, labels: Array, names: tuple[str, ...]) -> list[tuple[int, float | None]]:
        """The mean Dice over the samples that have the class."""
        dice = self._dice(outputs, labels)
        flat = labels.reshape(len(labels), -1)
        rows: list[tuple[int, float | None]] = []
        for k in range(len(names)):
            of_class = dice[(flat == k).any(1), k]
            rows.append((len(of_class), float(of_class.mean()) if len(of_class) else None))
        return rows
