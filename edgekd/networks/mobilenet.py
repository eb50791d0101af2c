"""MobileNetV2 for small and large images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from edgekd.errors import RecipeError
from edgekd.networks.layers import GlobalAveragePool, check_width, conv_bn, he_initialise
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.data import Shape

# Expansion, channels, blocks, stride of the first block: table 2 of the paper.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, LAST = 32, 1280
SMALLEST_MAP = 3


@register("network")
def mobilenet_v2(shape: Shape, num_classes: int, *, width: float = 1.0, dropout: float = 0.2) -> nn.Module:
    """MobileNetV2, with fewer strides on small images.

    Sandler, Howard, Zhu, Zhmoginov, Chen: "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2.
    The published five halvings hold from 96 pixels; on smaller images the first ones are left out so that the last map
    keeps 3 pixels a side or more (three halvings at 32 pixels, as usual on CIFAR). Activations are ReLU6, as published.
    Maps [B,C,H,W] to logits [B,K]. Raises RecipeError for a width that makes no network or a dropout outside 0..1.
    """
    if not 0 <= dropout < 1:
        raise RecipeError(
            f"network mobilenet_v2 cannot have dropout = {dropout}",
            allowed="allowed: from 0 to below 1",
            fix="set dropout = 0.2",
        )
    return MobileNetV2(shape, num_classes, width, dropout)


class MobileNetV2(nn.Module):
    """Sandler et al. 2018: a convolution, seven stages of inverted residuals, a 1x1 convolution, pool, linear."""

    def __init__(self, shape: Shape, num_classes: int, width: float, dropout: float) -> None:
        super().__init__()
        stem_stride, *stage_strides = strides_for(shape)
        channels = divisible(STEM, width)
        self.stem = nn.Sequential(*conv_bn(shape.channels, channels, stride=stem_stride), nn.ReLU6())
        blocks = []
        for (expansion, out, count, _), first_stride in zip(STAGES, stage_strides, strict=True):
            out = divisible(out, width)
            for stride in (first_stride, *[1] * (count - 1)):
                blocks.append(InvertedResidual(channels, out, stride, expansion))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        last = divisible(LAST, max(1.0, width))
        self.last = nn.Sequential(*conv_bn(channels, last, kernel=1), nn.ReLU6())
        self.pool, self.dropout = GlobalAveragePool(), nn.Dropout(dropout)
        self.fc = nn.Linear(last, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B,K] of images [B,C,H,W]."""
        logits: Tensor = self.fc(self.dropout(self.pool(self.last(self.blocks(self.stem(x))))))
        return logits


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 linear projection; with a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [*conv_bn(in_channels, hidden, kernel=1), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*conv_bn(hidden, hidden, stride=stride, groups=hidden), nn.ReLU6()]
        self.layers = nn.Sequential(*expand, *depthwise, *conv_bn(hidden, out_channels, kernel=1))
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to [B,C',H/stride,W/stride]."""
        out: Tensor = self.layers(x)
        return x + out if self.residual else out


def strides_for(shape: Shape) -> list[int]:
    """Strides of the stem and the stages: as published, less the first halvings that the image is too small for."""
    strides = [2, *(stride for *_, stride in STAGES)]
    halvings = max(0, int(math.log2(min(shape.height, shape.width) / SMALLEST_MAP)))
    for index, stride in enumerate(strides):
        if strides.count(2) > halvings and stride == 2:
            strides[index] = 1
    return strides


def divisible(channels: int, width: float, divisor: int = 8) -> int:
    """Scaled channels rounded to a multiple of 8, never more than 10% below: the rule of the authors' code."""
    check_width(width)
    exact = channels * width
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * exact else rounded
