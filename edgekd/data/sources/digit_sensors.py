"""scikit-learn's digits as two sensors see them: the scan, and what a coarse and noisy sensor makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.data.dataset import Images, Part, RawData
from edgekd.data.sources.digits import CLASSES, digits_file, digits_from_csv
from edgekd.registry import register

SEED, NOISE, CELL = 0, 24.0, 2


@register("dataset")
class digit_sensors:
    """Handwritten digits of 8x8 pixels, channel 0 as scanned, channel 1 as a coarse and noisy sensor sees them.

    The second is made by a rule: means over cells of 2x2 pixels, with Gaussian noise of 24 of 255 on each cell, drawn
    by one fixed generator.
    """

    def files(self) -> list[Path]:
        """The digits' file. Raises MissingError when scikit-learn is not installed."""
        return [digits_file()]

    def read(self) -> RawData:
        """Images uint8 [1797, 2, 8, 8]. There is no test part: `load` carves one."""
        file = digits_file()
        scans, numbers = digits_from_csv(file)
        return RawData(
            Part(np.concatenate([scans, coarse(scans)], 1), numbers, file, lambda i: f"{file}: row {i}"),
            class_names=CLASSES,
            notes=("channel 1 is made of channel 0 by a rule: see digit_sensors in edgekd list datasets",),
        )


def coarse(images: Images) -> Images:
    """What the second sensor sees, uint8 [N, 1, H, W]."""
    n, _, height, width = images.shape
    cells = images.reshape(n, 1, height // CELL, CELL, width // CELL, CELL).mean((3, 5))
    noisy = cells + np.random.default_rng(SEED).normal(0, NOISE, cells.shape)
    seen: Images = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    return np.kron(seen, np.ones((CELL, CELL), np.uint8))
