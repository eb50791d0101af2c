"""Labels that number classes: checks that every task with classes needs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgekd.errors import DataError
from edgekd.tasks import Array, Part, one_per_image


def check(part: Part, names: tuple[str, ...]) -> None:
    """Raise DataError unless there is one class number per image."""
    one_per_image(part, "one label per image")
    if part.labels.ndim != 1:
        raise DataError(
            f"{part.file}: {len(part.images)} images, but labels of shape {list(part.labels.shape)}",
            allowed="expected: one label per image",
            fix="make the file anew; or name another task, such as data.task = segmentation",
        )
    if part.labels.dtype.kind not in "iu":
        raise DataError(
            f"{part.file}: the labels are of type {part.labels.dtype}",
            allowed="expected: integers, 0 for the first class",
            fix="save them as int64; or, for values to be estimated, set data.task = regression",
        )
    # Without names, a class number as large as the number of samples is no class number (an id, a regression target).
    in_range(part.labels, len(names) or len(part.labels), part.where, names)


def in_range(numbers: Array, limit: int, where: Callable[[int], str], names: tuple[str, ...]) -> None:
    """Raise DataError, with the place of the first, when a class number [N] is not in 0..limit - 1."""
    wrong = np.flatnonzero((numbers < 0) | (numbers >= limit))
    if len(wrong):
        raise DataError(
            f"{where(int(wrong[0]))}: the label is {numbers[wrong[0]]}, and {len(wrong) - 1} more like it",
            allowed=f"expected: 0 to {limit - 1}" + (f", for the {len(names)} class names" if names else ""),
            fix="correct the labels, or the class names",
        )


def check_against_train(purpose: str, part: Part, train: Part, names: tuple[str, ...]) -> None:
    """Raise DataError when train has a single class, or another part one that train has not."""
    seen = np.unique(train.labels)
    alien = np.flatnonzero(~np.isin(part.labels, seen))
    if len(alien):
        label = int(part.labels[alien[0]])
        known = f'"{names[label]}"' if label < len(names) else str(label)
        raise DataError(
            f"{part.where(int(alien[0]))}: class {known} is in the {purpose} part only",
            allowed=f"expected: one of the {len(seen)} classes of {train.file}",
            fix=f"add training samples of class {known}, or take it out of the {purpose} part",
        )


def check_several(train: Part, names: tuple[str, ...]) -> None:
    """Raise DataError when all training samples are of one class."""
    seen = np.unique(train.labels)
    if len(seen) < 2:
        raise DataError(
            f'{train.file}: all {len(train.labels)} training samples are of one class, "{names[int(seen[0])]}"',
            allowed="expected: at least two classes",
            fix="add samples of another class",
        )


def notes(train: Part, names: tuple[str, ...]) -> list[str]:
    """Which classes have no training sample."""
    seen = set(np.unique(train.labels).tolist())
    missing = [name for k, name in enumerate(names) if k not in seen]
    return (
        [f"{len(missing)} of {len(names)} classes have no training sample: {', '.join(missing[:5])}"] if missing else []
    )


def named(labels: Array) -> tuple[str, ...]:
    """ "0", "1", ... up to the highest number."""
    return tuple(str(k) for k in range(int(labels.max()) + 1))


def counts(labels: Array, names: tuple[str, ...]) -> dict[str, int]:
    """How many samples [N] there are of each class, by name."""
    return dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))


def shares(right: npt.NDArray[np.bool_], labels: Array, names: tuple[str, ...]) -> list[tuple[int, float | None]]:
    """For each class how many samples it has, and which share of them is right."""
    found: list[tuple[int, float | None]] = []
    for k in range(len(names)):
        of_class = right[labels == k]
        found.append((len(of_class), float(of_class.mean()) if len(of_class) else None))
    return found
