"""The MNIST family's IDX files."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekd.data.dataset import Part, RawData
from edgekd.data.files import content, existing
from edgekd.errors import DataError, RecipeError
from edgekd.registry import register

_UINT8 = 8  # the type byte of IDX for unsigned bytes, the only type the MNIST family has


@register("dataset")
class idx:
    """MNIST's IDX files, plain or gzip: a folder with train-images-idx3-ubyte, train-labels-..., t10k-images-..., ...

    Also Fashion-MNIST, KMNIST and EMNIST, whose file names only begin otherwise (emnist-letters-train-images-...).
    A part without a t10k or test file is no error: a test share is then kept from train. Format: Y. LeCun, C. Cortes,
    C. Burges, "The MNIST database".
    """

    def __init__(self, *, path: Path) -> None:
        self.path = path

    def files(self) -> list[Path]:
        """The two files of train and, where they are, of test. Raises RecipeError when those of train are not there."""
        return [file for pair in self._pairs() for file in pair]

    def read(self) -> RawData:
        """Read them. Raises DataError that names the file which is cut short or is no IDX file."""
        parts = [_part(images, labels) for images, labels in self._pairs()]
        return RawData(parts[0], parts[1] if len(parts) > 1 else None)

    def _pairs(self) -> list[tuple[Path, Path]]:
        """Images and labels of train and, if any, of test."""
        folder = existing(self.path)
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        pairs = []
        for marks in (("train",), ("t10k", "test")):
            images, labels = (_named(files, marks, what) for what in ("images", "labels"))
            if images and labels:
                pairs.append((images, labels))
            elif images or labels or not pairs:
                raise RecipeError(
                    f'data.path = "{self.path}": {marks[0]}-images-idx3-ubyte and {marks[0]}-labels-idx1-ubyte'
                    " are not both there",
                    allowed="expected: a folder with both files, plain or .gz",
                    fix="set data.path to the folder that holds them",
                )
        return pairs


def _named(files: list[Path], marks: tuple[str, ...], what: str) -> Path | None:
    """The file whose name says so, the plain one before the same one as .gz; None when there is none."""
    pattern = re.compile(rf"(^|-)({'|'.join(marks)})-{what}[-.]idx\d-ubyte(\.gz)?$")
    found = [file for file in files if pattern.search(file.name)]
    if len({file.name.removesuffix(".gz") for file in found}) > 1:
        raise RecipeError(
            f"{found[0].parent}: {found[0].name} and {found[1].name} are of different data sets",
            allowed="expected: the files of one data set in a folder",
            fix="move one set to a folder of its own",
        )
    return found[0] if found else None


def _part(images_file: Path, labels_file: Path) -> Part:
    images, labels = _array(images_file, 3), _array(labels_file, 1)
    return Part(images[:, None], labels, images_file, lambda i: f"{labels_file}: sample {i}")


def _array(file: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    data = content(file)
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, _UINT8, dimensions)):
        raise DataError(
            f"{file}: not an IDX file of unsigned bytes in {dimensions} dimensions (it begins with {data[:4].hex()!r})",
            allowed=f"expected: 4 bytes 00 00 08 0{dimensions}, the dimensions, then the values",
            fix="fetch the file again",
        )
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    if len(data) - header != math.prod(shape):
        raise DataError(
            f"{file}: {len(data) - header} bytes of values, but its header says {' x '.join(map(str, shape))}",
            allowed=f"expected: {math.prod(shape)} bytes",
            fix="fetch the file again; it is cut short or damaged",
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
