"""Generators: from noise to images of a given size, for distillation without data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from edgekd.errors import RecipeError

SLOPE = 0.2
# Below this side the image grows from a quarter by two doublings, above it from a sixteenth by four.
LARGE = 32


class Small(nn.Module):
    """[B, Z] to [B, C, H, W]: a linear layer to a quarter of the sides, then doublings and convolutions.

    For images of at most 32 pixels, as in the authors' code. The last normalisation makes zero mean and unit variance
    of every channel, which is where normalised images lie.
    """

    def __init__(self, latent: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.start = 128, height // 4, width // 4
        self.expand = nn.Linear(latent, self.start[0] * self.start[1] * self.start[2])
        self.body = nn.Sequential(
            nn.BatchNorm2d(128),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.LeakyReLU(SLOPE),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 64, 3, padding=1), nn.BatchNorm2d(64), nn.LeakyReLU(SLOPE),
            nn.Conv2d(64, channels, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(channels, affine=False),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        """Images, normalised."""
        images: Tensor = self.body(self.expand(noise).view(-1, *self.start))
        return images


class Large(nn.Module):
    """[B, Z] to [B, C, H, W]: a linear layer to a sixteenth of the sides, then four transposed convolutions.

    After DCGAN (Radford, Metz, Chintala, ICLR 2016). The authors' ends with tanh, this with `Small`'s normalisation.
    """

    def __init__(self, latent: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        widths = 512, 256, 128, 64
        self.start = widths[0], height // 16, width // 16
        self.expand = nn.Linear(latent, self.start[0] * self.start[1] * self.start[2])
        layers: list[nn.Module] = [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1), nn.Tanh()]
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(channels, affine=False))

    def forward(self, noise: Tensor) -> Tensor:
        """Images, normalised."""
        images: Tensor = self.body(self.expand(noise).view(-1, *self.start))
        return images


def generator(latent: int, shape: Sequence[int]) -> nn.Module:
    """The generator for images [C, H, W] of this shape. Raises RecipeError for sides that it cannot make."""
    sides = shape[1:]
    made, factor = (Small, 4) if max(sides) <= LARGE else (Large, 16)
    if len(sides) != 2 or any(side % factor for side in sides):
        nearest = "x".join(str(factor * max(1, round(side / factor))) for side in sides[:2])
        raise RecipeError(
            f"the generator of dfad cannot make images of {'x'.join(map(str, sides))} pixels",
            allowed=f"expected: two sides that are multiples of 4, beyond {LARGE} pixels of 16: it doubles them",
            fix=f"use a teacher for images of {nearest} pixels, or another method",
            key="distill.method",
        )
    return made(latent, *shape)
