"""What exposure, compression, resolution and dirt on the lens do."""

from __future__ import annotations

import io

import numpy as np

from edgekd.data.corruptions import Floats, side_of
from edgekd.data.corruptions.blur import convolved
from edgekd.registry import register

STEPS = (0.1, 0.2, 0.3, 0.4, 0.5)


@register("corruption")
def brightness_down(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Darker by 0.1 to 0.5 of white."""
    del rng
    return images - STEPS[severity - 1]


@register("corruption")
def brightness_up(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Brighter by 0.1 to 0.5 of white."""
    del rng
    return images + STEPS[severity - 1]


@register("corruption")
def contrast_down(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Values 0.4 to 0.05 times as far from the image's mean."""
    del rng
    return _spread(images, (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1])


@register("corruption")
def contrast_up(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Values 1.5 to 5 times as far from the image's mean [R]."""
    del rng
    return _spread(images, (1.5, 2.0, 2.5, 3.5, 5.0)[severity - 1])


def _spread(images: Floats, factor: float) -> Floats:
    mean = images.mean((2, 3), keepdims=True)
    return np.asarray((images - mean) * factor + mean)


@register("corruption")
def jpeg(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """JPEG of quality 25 to 7, by Pillow."""
    from PIL import Image

    del rng
    quality, made = (25, 18, 15, 10, 7)[severity - 1], np.empty_like(images)
    for number, image in enumerate(np.rint(images * 255).astype(np.uint8)):
        file = io.BytesIO()
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        decoded = np.asarray(Image.open(file), np.float64) / 255
        made[number] = decoded if decoded.ndim == 2 else decoded.transpose(2, 0, 1)
    return made


@register("corruption")
def pixelate(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """0.6 to 0.25 times as many pixels along a side, and back again."""
    del rng
    share, made = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1], images
    for axis in (2, 3):
        size = images.shape[axis]
        few = max(1, int(size * share))
        # The mean over the part of the axis that each coarse pixel covers, then the coarse pixel of each fine one.
        ends = np.linspace(0, size, few + 1)
        covered = np.clip(np.minimum.outer(ends[1:], np.arange(1, size + 1)), 0, None)
        covered = np.clip(covered - np.maximum.outer(ends[:-1], np.arange(size)), 0, None) * few / size
        nearest = covered[np.minimum((np.arange(size) + 0.5) * few // size, few - 1).astype(int)]
        made = np.moveaxis(np.tensordot(made, nearest, (axis, 1)), -1, axis)
    return made


@register("corruption")
def spatter(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Drops on the lens, grey, over 5 to 35 percent of the image; their shapes are smoothed noise [R]."""
    cover = (0.05, 0.10, 0.17, 0.25, 0.35)[severity - 1]
    noise = rng.normal(0, 1, (len(images), 1, *images.shape[2:]))
    reach = max(1, round(side_of(images) / 32))
    ramp = 1.0 + reach - np.abs(np.arange(-reach, reach + 1))
    kernel = ramp[:, None] * ramp
    smooth = convolved(noise, kernel[None] / kernel.sum())
    drops = smooth >= np.quantile(smooth, 1 - cover, axis=(2, 3), keepdims=True)
    return np.where(drops, 0.3 * images + 0.7 * 0.6, images)
