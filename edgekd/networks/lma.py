"""The CIFAR-10 teacher and students of the LMA paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import nn

from edgekd.errors import RecipeError
from edgekd.networks.layers import he_initialise, scaled
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.data import Shape

# Channels of the convolutions of each block, channels of the linear layers; a max pool ends each block.
TEACHER = ([[76, 76], [126, 126], [148, 148, 148, 148]], [1200, 1200])
STUDENTS = {
    1: ([[75, 50], [50, 25]], [500]),
    2: ([[50, 25], [25, 10]], [400]),
    3: ([[25, 10], [10, 5]], [300]),
}
BLOCK_DROPOUT = (0.2, 0.3, 0.35)
LINEAR_DROPOUT = 0.4


@register("network")
def lma_teacher(shape: Shape, num_classes: int, *, width: float = 1.0) -> nn.Module:
    """Teacher of the LMA paper: 8 convolutions 3x3 and 2 hidden linear layers, 5.35 M parameters on CIFAR-10.

    Xu, Ke, Zhang, Bian, Liu: "Light Multi-segment Activation for Model Compression", AAAI 2020, and its code.
    Maps [B,C,H,W] to logits [B,K]; H and W from 8. Raises RecipeError for a smaller image.
    """
    return plain_network(shape, num_classes, *TEACHER, kernel=3, width=width)


@register("network")
def lma_student(shape: Shape, num_classes: int, *, size: Literal[1, 2, 3] = 3, width: float = 1.0) -> nn.Module:
    """Students 1 to 3 of the LMA paper: 4 convolutions 5x5 and 1 hidden linear layer, 1.00, 0.32, 0.11 M parameters.

    Xu, Ke, Zhang, Bian, Liu: "Light Multi-segment Activation for Model Compression", AAAI 2020. Built as in its code,
    with two max pools: the three of its table 5 do not give the parameter counts that it publishes.
    Maps [B,C,H,W] to logits [B,K]; H and W from 4. Raises RecipeError for a smaller image.
    """
    return plain_network(shape, num_classes, *STUDENTS[size], kernel=5, width=width)


def plain_network(
    shape: Shape, num_classes: int, blocks: list[list[int]], linears: list[int], *, kernel: int, width: float
) -> nn.Module:
    """Blocks of conv-BN-ReLU that end in max pool and dropout, then linear-BN-ReLU-dropout, then the logits."""
    smallest = 2 ** len(blocks)
    if min(shape.height, shape.width) < smallest:
        raise RecipeError(
            f"images of {shape.height}x{shape.width} are too small: this network halves them {len(blocks)} times",
            allowed=f"allowed: {smallest}x{smallest} pixels or more",
            fix="use the network resnet, which takes any size, or larger images",
        )
    features: list[nn.Module] = []
    channels = shape.channels
    for block, dropout in zip(blocks, BLOCK_DROPOUT, strict=False):
        for out in (scaled(c, width) for c in block):
            features += [nn.Conv2d(channels, out, kernel, padding="same"), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        features += [nn.MaxPool2d(2), nn.Dropout(dropout)]
    inputs = channels * (shape.height // smallest) * (shape.width // smallest)
    classifier: list[nn.Module] = [nn.Flatten()]
    for out in (scaled(c, width) for c in linears):
        classifier += [nn.Linear(inputs, out), nn.BatchNorm1d(out), nn.ReLU(), nn.Dropout(LINEAR_DROPOUT)]
        inputs = out
    network = nn.Sequential()
    network.add_module("features", nn.Sequential(*features))
    network.add_module("classifier", nn.Sequential(*classifier, nn.Linear(inputs, num_classes)))
    he_initialise(network)
    return network
