"""Volumes made of scikit-learn's digits, by a rule: small, and told apart by nobody who does not read the digit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.data.dataset import Part, RawData
from edgekd.data.sources.digits import BACKGROUND, CLASSES, digits_file, digits_from_csv, masks
from edgekd.registry import register

# How bright the digit is in the slices around the one that it is centred on; none elsewhere.
PROFILE = (0.7, 1.0, 0.7)
DEPTH = 8
SEED, NOISE = 0, 16.0


@register("dataset")
class digit_volumes:
    """Made volumes of 8x8x8 voxels: a handwritten digit three slices thick, in noise; a class for every voxel.

    The digit of row i of scikit-learn's digits is centred on slice 1 to 6, drawn for each row by one fixed generator,
    at 0.7 of its brightness in the slices beside it; Gaussian noise of 16 of 255 lies on all voxels. A voxel is of the
    digit's class where the digit alone has half of the full brightness, else background.
    """

    def files(self) -> list[Path]:
        """The digits' file. Raises MissingError when scikit-learn is not installed."""
        return [digits_file()]

    def read(self) -> RawData:
        """Images uint8 [1797, 1, 8, 8, 8], labels [1797, 8, 8, 8]. There is no test part: `load` carves one."""
        file = digits_file()
        images, numbers = digits_from_csv(file)
        rng = np.random.default_rng(SEED)
        centres = rng.integers(1, DEPTH - 1, len(images))
        clean = np.zeros((len(images), 1, DEPTH, 8, 8))
        for offset, share in zip((-1, 0, 1), PROFILE, strict=True):
            clean[np.arange(len(images)), :, centres + offset] = share * images
        volumes = np.clip(np.rint(clean + rng.normal(0, NOISE, clean.shape)), 0, 255).astype(np.uint8)
        labels = masks(clean.astype(np.uint8), numbers)
        return RawData(
            Part(volumes, labels, file, lambda i: f"{file}: row {i}"),
            class_names=(BACKGROUND, *CLASSES),
            notes=("the volumes are made of handwritten digits by a rule: see digit_volumes in edgekd list datasets",),
            task="segmentation",
        )
