"""scikit-learn's digits: 1797 grey images of 8x8 pixels in 10 classes, embedded in the installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgekd.data.dataset import Images, Part, RawData, TaskChoice
from edgekd.errors import MissingError
from edgekd.registry import register

CLASSES = tuple(str(digit) for digit in range(10))
BACKGROUND = "background"
INK = 128  # a pixel from here on belongs to the digit


@register("dataset")
class digits:
    """Handwritten digits, 1797 grey images of 8x8 pixels, 10 classes; comes with scikit-learn, needs no download.

    target: what is to be told of an image: `class`; `slant`, how far the writing leans to the right, in degrees, from
    the image's moments; `mask`, for every pixel the digit that it belongs to, or background.
    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998 (its test part).
    """

    def __init__(self, *, target: Literal["class", "slant", "mask"] = "class") -> None:
        self.target = target

    def files(self) -> list[Path]:
        """The one file, found without importing scikit-learn. Raises MissingError when that is not installed."""
        return [digits_file()]

    def read(self) -> RawData:
        """Values 0..16 are spread over 0..255. There is no test part: `load` carves one."""
        file = digits_file()
        images, numbers = digits_from_csv(file)
        labels: npt.NDArray[Any] = numbers
        names: tuple[str, ...] = CLASSES
        task: TaskChoice = "classification"
        if self.target == "slant":
            labels, names, task = slants(images), ("slant",), {"regression": {"unit": "°"}}
        elif self.target == "mask":
            labels, names, task = masks(images, numbers), (BACKGROUND, *CLASSES), "segmentation"
        return RawData(Part(images, labels, file, lambda i: f"{file}: row {i}"), class_names=names, task=task)


def digits_file() -> Path:
    """Where scikit-learn keeps them. Raises MissingError when it is not installed."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(
            'dataset "digits" is a file of the Python package scikit-learn, which is not installed',
            allowed="it is read from that package, nothing is downloaded",
            fix="pip install 'edgekd[train]'",
        )
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"


def digits_from_csv(file: Path) -> tuple[Images, npt.NDArray[np.int64]]:
    """Images uint8 [1797, 1, 8, 8] and digits [1797]."""
    table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    return np.rint(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8), table[:, 64]


def slants(images: Images) -> npt.NDArray[np.float64]:
    """How far each image [N, 1, H, W] leans to the right, [N] in degrees: the shear atan(-m11 / m02) that would set it
    upright, of the central moments m of its brightness (x to the right, y down)."""
    weight = images[:, 0].astype(np.float64)
    weight /= weight.sum((1, 2), keepdims=True)
    y, x = np.indices(weight.shape[1:])
    dx, dy = (axis - (weight * axis).sum((1, 2), keepdims=True) for axis in (x, y))
    shear = -(weight * dx * dy).sum((1, 2)) / (weight * dy * dy).sum((1, 2))
    return np.asarray(np.degrees(np.arctan(shear)))


def masks(images: Images, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The class of every pixel, [N, ...] for images [N, 1, ...]: 0 for background, digit + 1 for ink."""
    ink = images[:, 0] >= INK
    return ink * (numbers.reshape(-1, *[1] * (ink.ndim - 1)) + 1)
