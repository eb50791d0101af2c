"""Noise of a sensor in little light."""

from __future__ import annotations

import numpy as np

from edgekd.data.corruptions import Floats
from edgekd.registry import register


@register("corruption")
def gaussian_noise(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Normal noise on every value, of standard deviation 0.08 to 0.38."""
    return images + rng.normal(0, (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1], images.shape)


@register("corruption")
def shot_noise(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Photons are counted, 60 to 3 of them for white."""
    photons = (60.0, 25.0, 12.0, 5.0, 3.0)[severity - 1]
    return rng.poisson(images * photons) / photons
