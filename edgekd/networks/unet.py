"""U-Net for images and volumes: an answer for every pixel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.errors import RecipeError
from edgekd.networks.layers import he_initialise, scaled
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.data import Shape

DEEPEST = 6


@register("network")
def unet(shape: Shape, num_classes: int, *, levels: int = 2, channels: int = 16, width: float = 1.0) -> nn.Module:
    """U-Net: an encoder that halves the image and a decoder that comes back, for maps of classes; 2-D and 3-D.

    levels: how often the image is halved; both sides (and the depth) must be divisible by 2 to that power.
    channels: of the first level, doubled at each halving. width: scales them all.
    Source: O. Ronneberger et al., MICCAI 2015; O. Cicek et al., MICCAI 2016 for volumes. It differs: convolutions keep
    the size, batch normalisation follows each, and nearest neighbours enlarge the map in place of a transposed
    convolution, which costs no weights and which every runtime has.
    """
    size = shape.dimensions[1:]
    if not 1 <= levels <= DEEPEST or any(side % 2**levels for side in size):
        fitting = [n for n in range(1, DEEPEST + 1) if not any(side % 2**n for side in size)]
        raise RecipeError(
            f"a unet of levels = {levels} cannot halve images of {'x'.join(map(str, size))} so often",
            allowed=f"expected: levels from 1 to {max(fitting)}" if fitting else "expected: sides divisible by 2",
            fix=f"set levels to {max(fitting)}" if fitting else "resize the images",
        )
    return UNet(shape.channels, num_classes, [scaled(channels * 2**level, width) for level in range(levels + 1)],
                flat=not shape.depth)  # fmt: skip


class UNet(nn.Module):
    """Encoder blocks, from fine to coarse, decoder blocks back, and a head of 1x1."""

    def __init__(self, in_channels: int, num_classes: int, channels: list[int], *, flat: bool) -> None:
        super().__init__()
        inputs = [in_channels, *channels[:-1]]
        self.encoder = nn.ModuleList(_block(a, b, flat=flat) for a, b in zip(inputs, channels, strict=True))
        self.decoder = nn.ModuleList(
            _block(coarse + fine, fine, flat=flat)
            for fine, coarse in zip(channels[-2::-1], channels[:0:-1], strict=True)
        )
        self.pool = nn.MaxPool2d(2) if flat else nn.MaxPool3d(2)
        self.head = (nn.Conv2d if flat else nn.Conv3d)(channels[0], num_classes, 1)
        he_initialise(self)
        nn.init.kaiming_normal_(self.head.weight, nonlinearity="linear")

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to logits [B,K,H,W]; the same with a depth before H."""
        maps = []
        for number, block in enumerate(self.encoder):
            x = block(self.pool(x) if number else x)
            maps.append(x)
        for block, fine in zip(self.decoder, maps[-2::-1], strict=True):
            x = block(torch.cat((F.interpolate(x, scale_factor=2.0, mode="nearest"), fine), 1))
        logits: Tensor = self.head(x)
        return logits


def _block(inputs: int, outputs: int, *, flat: bool) -> nn.Sequential:
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if flat else (nn.Conv3d, nn.BatchNorm3d)
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [conv(channels, outputs, 3, padding=1, bias=False), norm(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
