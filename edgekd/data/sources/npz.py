"""NumPy archives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.data.dataset import Images, Part, RawData, SplitName
from edgekd.data.files import existing
from edgekd.errors import DataError, RecipeError
from edgekd.registry import register

# How images and labels of a part are called: by Keras, by MedMNIST, and when there is one part only.
_NAMES = ("x_{}", "y_{}"), ("{}_images", "{}_labels")
_ONE_PART = "images", "labels"


@register("dataset")
class npz:
    """A NumPy archive with x_train, y_train, x_test, y_test, or train_images, train_labels, ..., or images, labels.

    Images are [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3 (when both fit, C comes last): uint8, other
    integers in 0..255, or floats in 0..1; volumes have a depth before H, and a channel. Labels
    are what the task wants: classes [N] or [N, 1], unless data.task says otherwise. A val part is used when there is
    one.
    """

    def __init__(self, *, path: Path) -> None:
        self.path = path

    def files(self) -> list[Path]:
        """The archive. Raises RecipeError when it is not there."""
        file = existing(self.path)
        if not file.is_file():
            raise RecipeError(
                f'data.path = "{self.path}": this is a folder', allowed="expected: an .npz file",
                fix="set data.path to the file",
            )  # fmt: skip
        return [file]

    def read(self) -> RawData:
        """Read it. Raises DataError that names the file and the array which is damaged or cannot be images."""
        [file] = self.files()
        try:
            # Opened here, because numpy.load leaves a damaged file open.
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:  # zip and header readers fed broken bytes raise nearly anything
            raise DataError(
                f"{file}: not a readable .npz file: {error}",
                allowed="expected: a whole file by numpy.savez, with no Python objects in it",
                fix="save or fetch the file again",
            ) from None
        parts = {part: made for part in _PARTS if (made := _part(arrays, part, file))}
        if "train" not in parts:
            raise DataError(
                f"{file}: no training images and labels in it; it has: {', '.join(sorted(arrays)) or 'nothing'}",
                allowed="expected: x_train and y_train, train_images and train_labels, or images and labels",
                fix="save the arrays under these names",
            )
        return RawData(parts["train"], parts.get("test"), parts.get("val"))


_PARTS: tuple[SplitName, ...] = ("train", "val", "test")


def _part(arrays: Mapping[str, npt.NDArray[Any]], part: SplitName, file: Path) -> Part | None:
    pairs = [tuple(name.format(part) for name in names) for names in _NAMES]
    for images, labels in [*pairs, _ONE_PART] if part == "train" else pairs:
        if images in arrays and labels in arrays:
            y, where = arrays[labels], f"{file}: {images}"
            y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
            return Part(_images(arrays[images], where), y, file, (where + "[{}]").format)
    return None


def _images(array: npt.NDArray[Any], where: str) -> Images:
    """Any of the accepted layouts and types to uint8 [N, C, H, W] or [N, C, D, H, W]."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim in (4, 5) and array.shape[-1] in (1, 3):
        array = np.moveaxis(array, -1, 1)
    if array.ndim not in (4, 5) or array.shape[1] not in (1, 3):
        raise DataError(
            f"{where} has shape {list(array.shape)}",
            allowed="expected: [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3; for volumes D before H",
            fix="save the images in one of these shapes",
        )
    if array.dtype.kind == "f":
        return _from_floats(array, where)
    if array.dtype.kind not in "iu" or (array.size and (array.min() < 0 or array.max() > 255)):
        raise DataError(
            f"{where} is {array.dtype}" + (f" from {array.min()} to {array.max()}" if array.size else ""),
            allowed="expected: integers from 0 to 255, or floats from 0 to 1",
            fix="scale the pixels, and save them as uint8",
        )
    return np.ascontiguousarray(array, np.uint8)


def _from_floats(array: npt.NDArray[Any], where: str) -> Images:
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not finite.all():
        first = int(np.flatnonzero(~finite)[0])
        raise DataError(
            f"{where}[{first}] has NaN or infinite pixels, and {int((~finite).sum()) - 1} more images have",
            allowed="expected: floats from 0 to 1",
            fix="correct these images, or take them out",
        )
    if array.size and (array.min() < 0 or array.max() > 1):
        raise DataError(
            f"{where} has floats from {array.min():g} to {array.max():g}",
            allowed="expected: floats from 0 to 1, or integers from 0 to 255",
            fix="scale the pixels (undo any normalisation), and save them as uint8",
        )
    return np.ascontiguousarray(np.rint(array * 255), np.uint8)
