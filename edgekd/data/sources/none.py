"""No images: for methods that make their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd import registry
from edgekd.data import loading
from edgekd.data.dataset import Part, RawData
from edgekd.errors import RecipeError
from edgekd.registry import register

SEED = 0


@register("dataset")
class none:
    """No image to learn from, for methods such as dfad that make their own; noise stands in where images must be.

    channels, height, width: of the images that the teacher takes. classes: how many it tells apart. samples: how many
    images an epoch stands for. test: another source for labelled test images, {NAME: {option: value}}; null scores
    nothing.
    """

    def __init__(
        self,
        *,
        height: int,
        width: int,
        classes: int,
        channels: int = 3,
        samples: int = 6400,
        test: dict[str, dict[str, str | int | bool]] | None = None,
    ) -> None:
        self.shape, self.classes, self.samples, self.test = (channels, height, width), classes, samples, test
        limits = {"channels": 1, "height": 1, "width": 1, "classes": 2, "samples": 2 * classes}
        for (name, least), value in zip(limits.items(), (*self.shape, classes, samples), strict=True):
            if value < least:
                raise RecipeError(
                    f"data.{name} = {value} is not valid",
                    allowed=f"expected: at least {least}",
                    fix=f"--set data.{name}={least}, or what the teacher was made for",
                    key=f"data.{name}",
                )
        if test is not None and len(test) != 1:
            raise RecipeError(
                f"data.test must name one data set, not {len(test)}",
                allowed="expected: {NAME: {option: value}}",
                fix="name one, see: edgekd list datasets",
                key="data.test",
            )

    def files(self) -> list[Path]:
        """Those of the test images. Raises RecipeError when their path is wrong."""
        if self.test is None:
            return []
        ((name, options),) = self.test.items()
        found: list[Path] = registry.create("dataset", name, options=options, where=f"data.test.{name}").files()
        return found

    def read(self) -> RawData:
        """Noise to train on, and the test images if there are any. Raises RecipeError when these do not fit."""
        pixels = np.random.default_rng(SEED).integers(0, 256, (self.samples, *self.shape), dtype=np.uint8)
        labels = np.arange(self.samples) % self.classes
        noise = Part(pixels, labels, Path("data.source = none"), lambda i: f"noise {i}")
        if self.test is None:
            note = (
                "there are no test images: nothing is scored, and noise stands in where graphs are compared and timed"
            )
            return RawData(noise, noise=True, notes=(NOTE, note))
        ((name, options),) = self.test.items()
        parts = loading.read(name, options)
        found = parts.test.images.shape[1:], len(parts.class_names)
        if found != (self.shape, self.classes):
            raise RecipeError(
                f"data.test.{name} has images of {'x'.join(map(str, found[0]))} in {found[1]} classes",
                allowed=f"expected: {'x'.join(map(str, self.shape))} in {self.classes} classes, as data says",
                fix="correct data.channels, data.height, data.width and data.classes, or name another test set",
                key="data.test",
            )
        test = Part(parts.test.images, parts.test.labels, parts.file, lambda i: f"{parts.file}: test sample {i}")
        return RawData(noise, test=test, class_names=parts.class_names, noise=True, notes=(NOTE,))


NOTE = "there are no training images: the method makes its own"
