"""Corruptions of test images, 13 kinds in 5 severities: how much of a network's score is left on bad pictures.

The kinds are those of LFW+C (A. Greco et al., Neural Computing and Applications 2021), in their three categories; the
severities follow ImageNet-C (D. Hendrycks, T. Dietterich, ICLR 2019) where that has the kind. [R] marks what neither
tells: contrast that rises, and how spatter is made. Lengths are shares of the shorter side, ImageNet-C's pixels over
its 224, but never so short that a small image would not notice: CIFAR-10-C's Gaussians, disks and lines like them [R].

A corruption is a function under `@register("corruption")` of images float64 [N, C, H, W] from 0 to 1, the severity from
1 to 5 and a random generator, which gives images of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgekd import registry
from edgekd.data.dataset import Images
from edgekd.errors import DataError

Floats = npt.NDArray[np.float64]
Corruption = Callable[[Floats, int, np.random.Generator], Floats]
SEVERITIES = (1, 2, 3, 4, 5)
# The side that ImageNet-C's lengths in pixels are for.
IMAGENET_SIDE = 224
CHUNK = 256


def category(kind: str) -> str:
    """What a kind is counted to, by the file that it is in: `noise`, `blur` or `digital` of the built-in ones."""
    return registry.entry("corruption", kind).module.rpartition(".")[2]


def check(images: Images) -> None:
    """Raise DataError for what is no set of pictures."""
    if images.ndim != 4:
        raise DataError(
            f"corruptions are of pictures, and these images are {'x'.join(map(str, images.shape[1:]))}",
            allowed="expected: channels, height and width",
            fix="set corruptions = null",
        )


def corrupted(images: Images, kind: str, severity: int) -> Images:
    """Images uint8 [N, C, H, W], corrupted; the same at every call, and for an image whatever follows it.

    Raises RecipeError for a kind that there is not, DataError for volumes.
    """
    check(images)
    change: Corruption = registry.entry("corruption", kind, "corruptions.kinds").load()
    made = np.empty_like(images)
    for number, start in enumerate(range(0, len(images), CHUNK)):
        rng = np.random.default_rng([number, severity, *kind.encode()])
        some = images[start : start + CHUNK].astype(np.float64) / 255
        made[start : start + CHUNK] = np.rint(np.clip(change(some, severity, rng), 0, 1) * 255)
    return made


def side_of(images: Floats) -> int:
    """The shorter side in pixels."""
    return int(min(images.shape[2:]))
