"""Residual networks for small images: CIFAR ResNets and wide ResNets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.errors import RecipeError
from edgekd.networks.layers import GlobalAveragePool, conv_bn, he_initialise, scaled
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.data import Shape


@register("network")
def resnet(shape: Shape, num_classes: int, *, depth: int = 20, width: float = 1.0) -> nn.Module:
    """CIFAR ResNet of depth 6n+2: 8, 14, 20, 26, 32, 44, 56, 110.

    He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, shortcuts of option A.
    Maps [B,C,H,W] to logits [B,K]; any H and W. Raises RecipeError for another depth or a width that makes no network.
    """
    return CifarResNet(shape.channels, num_classes, _blocks_per_stage(depth, 2, "ResNet"), width)


@register("network")
def wrn(
    shape: Shape, num_classes: int, *, depth: int = 16, k: int = 4, dropout: float = 0.0, width: float = 1.0
) -> nn.Module:
    """Wide ResNet WRN-depth-k of depth 6n+4: 10, 16, 22, 28, 40.

    Zagoruyko, Komodakis: "Wide Residual Networks", BMVC 2016, table 1. `k` widens the three stages but not the first
    convolution, as published; `width` scales every layer, as in the other networks. Maps [B,C,H,W] to logits [B,K].
    Raises RecipeError for another depth, k < 1, a dropout outside 0..1 or a width that makes no network.
    """
    if k < 1 or not 0 <= dropout < 1:
        raise RecipeError(
            f"network wrn cannot have k = {k} and dropout = {dropout}",
            allowed="allowed: k from 1, dropout from 0 to below 1",
            fix="set k = 4 and dropout = 0.0",
        )
    return WideResNet(shape.channels, num_classes, _blocks_per_stage(depth, 4, "wide ResNet"), k, dropout, width)


def _blocks_per_stage(depth: int, extra: int, family: str) -> int:
    """`n` of depth = 6n + extra: three stages of n blocks of two convolutions."""
    blocks, rest = divmod(depth - extra, 6)
    if rest or not 1 <= blocks <= 200:
        raise RecipeError(
            f"depth = {depth} is not the depth of a {family}",
            allowed=f"allowed: 6n+{extra}, that is {', '.join(str(6 * n + extra) for n in (1, 2, 3, 4, 5, 6))}, ...",
            fix=f"set depth = {6 * min(max(round((depth - extra) / 6), 1), 200) + extra}",
        )
    return blocks


class CifarResNet(nn.Module):
    """He et al. 2016: one convolution, three stages of `blocks` blocks on 16, 32, 64 channels, average pool, linear."""

    def __init__(self, in_channels: int, num_classes: int, blocks: int, width: float) -> None:
        super().__init__()
        first, *_ = channels = [scaled(c, width) for c in (16, 32, 64)]
        self.stem = nn.Sequential(*conv_bn(in_channels, first), nn.ReLU())
        stages, inputs = [], first
        for stage, outputs in enumerate(channels):
            strides = [2 if stage else 1, *[1] * (blocks - 1)]
            ins = [inputs, *[outputs] * (blocks - 1)]
            stages.append(nn.Sequential(*(BasicBlock(i, outputs, s) for i, s in zip(ins, strides, strict=True))))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(inputs, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B,K] of images [B,C,H,W]."""
        logits: Tensor = self.fc(self.pool(self.stages(self.stem(x))))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an identity shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(in_channels, out_channels, stride=stride)
        self.act1 = nn.ReLU()
        self.conv2, self.bn2 = conv_bn(out_channels, out_channels)
        self.act2 = nn.ReLU()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to [B,C',H/stride,W/stride]."""
        out: Tensor = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        out = self.act2(out + self.shortcut(x))
        return out

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: subsampled identity, new channels zero; it has no parameters."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        new = self.conv2.out_channels - self.conv1.in_channels  # asked each time: channels may have been removed
        return F.pad(x, (0, 0, 0, 0, 0, new)) if new else x


class WideResNet(nn.Module):
    """Zagoruyko and Komodakis 2016: pre-activation blocks on 16k, 32k, 64k channels."""

    def __init__(self, in_channels: int, num_classes: int, blocks: int, k: int, dropout: float, width: float) -> None:
        super().__init__()
        inputs = scaled(16, width)
        self.stem = nn.Conv2d(in_channels, inputs, 3, padding=1, bias=False)
        stages = []
        for stage, outputs in enumerate(scaled(c * k, width) for c in (16, 32, 64)):
            layers = [WideBlock(inputs, outputs, 2 if stage else 1, dropout)]
            layers += [WideBlock(outputs, outputs, 1, dropout) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*layers))
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.bn, self.act = nn.BatchNorm2d(inputs), nn.ReLU()
        self.pool = GlobalAveragePool()
        self.fc = nn.Linear(inputs, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B,K] of images [B,C,H,W]."""
        logits: Tensor = self.fc(self.pool(self.act(self.bn(self.stages(self.stem(x))))))
        return logits


class WideBlock(nn.Module):
    """BN-ReLU-conv twice with dropout between; where the shape changes the shortcut is a 1x1 convolution of BN-ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.act1 = nn.BatchNorm2d(in_channels), nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(out_channels), nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to [B,C',H/stride,W/stride]."""
        out: Tensor = self.act1(self.bn1(x))
        kept: Tensor = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.dropout(self.act2(self.bn2(self.conv1(out)))))
        return kept + out
