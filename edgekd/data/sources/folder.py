"""A folder of images, a folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from edgekd.data.dataset import RawData, SplitName
from edgekd.data.decoding import Encoded, EncodedPart, raw_from_encoded
from edgekd.data.files import existing, part_named
from edgekd.errors import RecipeError
from edgekd.registry import register

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


@register("dataset")
class folder:
    """A folder of images: train/CLASS/*.png, and test/CLASS/*.png, val/CLASS/*.png, or both; or CLASS/*.png.

    Classes are numbered in the order of their names. Without a train folder, every folder is a class and all images
    are train. resize, channels: see `edgekd.data.decoding.raw_from_encoded`.
    """

    def __init__(self, *, path: Path, resize: int | None = None, channels: Literal[1, 3] | None = None) -> None:
        self.path, self.resize, self.channels = path, resize, channels

    def files(self) -> list[Path]:
        """The images of all parts. Raises RecipeError when there are no class folders for training."""
        return [file for _, classes in self._parts().values() for files in classes.values() for file in files]

    def read(self) -> RawData:
        """Read and decode them. Raises DataError that names the file."""
        parts = self._parts()
        names = tuple(sorted({name for _, classes in parts.values() for name in classes}))
        encoded: dict[SplitName, EncodedPart] = {}
        for part, (place, classes) in parts.items():
            images = [Encoded(str(file), file) for files in classes.values() for file in files]
            labels = np.repeat([names.index(name) for name in classes], [len(files) for files in classes.values()])
            encoded[part] = EncodedPart(images, labels, place)
        return raw_from_encoded(encoded, names, resize=self.resize, channels=self.channels)

    def _parts(self) -> dict[SplitName, tuple[Path, dict[str, list[Path]]]]:
        """For each part its folder, and the image files of each class."""
        path = existing(self.path)
        parts: dict[SplitName, tuple[Path, dict[str, list[Path]]]] = {}
        for child in _folders(path):
            part, classes = part_named(child.name), _classes(child)
            if part and classes:
                parts[part] = child, classes
        if "train" not in parts:  # a class may be called train as well: a part has folders in it
            parts = {"train": (path, _classes(path))}
        if not parts["train"][1]:
            raise RecipeError(
                f'data.path = "{self.path}": there are no images in class folders',
                allowed=f"expected: train/CLASS/IMAGE or CLASS/IMAGE, with {', '.join(sorted(_SUFFIXES))}",
                fix="set data.path to the folder that holds train, or the class folders",
            )
        return parts


def _classes(place: Path) -> dict[str, list[Path]]:
    """The image files below each folder in `place` that has any."""
    found = {child.name: _images(child) for child in _folders(place)}
    return {name: files for name, files in found.items() if files}


def _folders(place: Path) -> list[Path]:
    children = place.iterdir() if place.is_dir() else ()
    return sorted(child for child in children if child.is_dir() and not child.name.startswith("."))


def _images(place: Path) -> list[Path]:
    return sorted(file for file in place.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
