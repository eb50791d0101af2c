"""Blur of a lens out of focus, of motion, of zooming."""

from __future__ import annotations

import numpy as np

from edgekd.data.corruptions import IMAGENET_SIDE, Floats, side_of
from edgekd.registry import register

# Kernels are averaged over this many points of every pixel and side, so that small ones have a shape too.
FINE = 9
# Points of a line of motion.
POINTS = 65
ZOOMS = 8


def _length(images: Floats, of_imagenet: float, least: float) -> float:
    """In pixels."""
    return max(of_imagenet * side_of(images) / IMAGENET_SIDE, least)


@register("corruption")
def defocus_blur(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """A lens out of focus: the mean over a disk of 3 to 10 pixels radius of 224, of 0.6 to 1.5 pixels at least."""
    del rng
    radius = _length(images, (3.0, 4.0, 6.0, 8.0, 10.0)[severity - 1], (0.6, 0.8, 1.0, 1.25, 1.5)[severity - 1])
    reach = int(np.ceil(radius + 0.5))
    fine = (np.arange((2 * reach + 1) * FINE) + 0.5) / FINE - reach - 0.5
    disk = (fine[:, None] ** 2 + fine**2 <= radius**2).astype(np.float64)
    kernel = disk.reshape(2 * reach + 1, FINE, 2 * reach + 1, FINE).sum((1, 3))
    return convolved(images, kernel[None] / kernel.sum())


@register("corruption")
def gaussian_blur(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """A Gaussian of 1 to 6 pixels of 224, of 0.4 to 1 pixel at least."""
    del rng
    sigma = _length(images, (1.0, 2.0, 3.0, 4.0, 6.0)[severity - 1], (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1])
    reach = int(np.ceil(4 * sigma))
    return convolved(images, _gaussian(sigma, reach)[None])


def _gaussian(sigma: float, reach: int) -> Floats:
    """A Gaussian averaged over every pixel, [2 reach + 1, 2 reach + 1]."""
    fine = (np.arange((2 * reach + 1) * FINE) + 0.5) / FINE - reach - 0.5
    line = np.exp(-(fine**2) / (2 * sigma**2)).reshape(-1, FINE).sum(1)
    line /= line.sum()
    kernel: Floats = line[:, None] * line
    return kernel


@register("corruption")
def motion_blur(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """The mean along a line of 10 to 25 pixels of 224, 1.5 to 4 at least, in a direction of its own for every image."""
    length = _length(images, (10.0, 14.0, 17.0, 21.0, 25.0)[severity - 1], (1.5, 2.0, 2.5, 3.0, 4.0)[severity - 1])
    angle, along = rng.uniform(0, np.pi, len(images)), np.linspace(-length / 2, length / 2, POINTS)
    reach = int(np.ceil(length / 2)) + 1
    kernels = np.zeros((len(images), 2 * reach + 1, 2 * reach + 1))
    y, x = (reach + along * direction[:, None] for direction in (np.sin(angle), np.cos(angle)))
    image = np.arange(len(images))[:, None]
    for dy in (0, 1):
        for dx in (0, 1):
            row, column = (np.floor(axis).astype(int) + step for axis, step in ((y, dy), (x, dx)))
            np.add.at(kernels, (image, row, column), (1 - np.abs(y - row)) * (1 - np.abs(x - column)) / POINTS)
    return convolved(images, kernels)


@register("corruption")
def zoom_blur(images: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """The mean over enlargements of the centre, up to 1.11 to 1.33 times."""
    del rng
    largest = (1.11, 1.16, 1.21, 1.26, 1.33)[severity - 1]
    return np.asarray(np.mean([_enlarged(images, factor) for factor in np.linspace(1, largest, ZOOMS)], axis=0))


def _enlarged(images: Floats, factor: float) -> Floats:
    """Around the centre, by bilinear interpolation."""
    made = images
    for axis in (2, 3):
        size = images.shape[axis]
        place = (np.arange(size) - (size - 1) / 2) / factor + (size - 1) / 2
        below = np.clip(np.floor(place).astype(int), 0, max(0, size - 2))
        share = (place - below).reshape([-1 if dimension == axis else 1 for dimension in range(4)])
        above = np.minimum(below + 1, size - 1)
        made = made.take(below, axis) * (1 - share) + made.take(above, axis) * share
    return made


def convolved(images: Floats, kernels: Floats) -> Floats:
    """Images [N, C, H, W] with kernels [N or 1, S, S] of odd S and sum 1; edges are repeated."""
    reach = kernels.shape[1] // 2
    padded = np.pad(images, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge")
    size = padded.shape[2:]
    spectrum = np.fft.rfft2(kernels, size)[:, None]
    whole = np.fft.irfft2(np.fft.rfft2(padded) * spectrum, size)
    return np.asarray(whole[:, :, 2 * reach :, 2 * reach :])
