"""A network that sees one sensor of several that looked at the same thing."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor, nn

from edgekd.errors import RecipeError
from edgekd.networks.building import build_chosen
from edgekd.registry import NetworkChoice, register

if TYPE_CHECKING:
    from edgekd.data import Shape


@register("network")
def sensor(shape: Shape, num_classes: int, *, channels: list[int], of: NetworkChoice) -> nn.Module:
    """A network that sees some channels of the images, of data whose other channels come from other sensors.

    So a teacher of the old sensor teaches a student of the new one: the same samples, seen by both, are the channels of
    one image. channels: which ones, counted from 0. of: NAME or {network: NAME, option: value}; with a checkpoint it
    is trained already. Its ONNX file takes all channels and reads its own; the others may be anything.
    Raises RecipeError for channels that the images do not have.
    """
    if not channels or len(set(channels)) < len(channels) or not set(channels) <= set(range(shape.channels)):
        raise RecipeError(
            f"network sensor cannot see the channels {channels} of images {shape}",
            allowed=f"expected: some of {', '.join(map(str, range(shape.channels)))}, each once",
            fix="set channels to those of its sensor",
        )
    seen = dataclasses.replace(shape, channels=len(channels))
    return Sensor(build_chosen(of, seen, num_classes), channels, is_trained=of["checkpoint"] is not None)


class Sensor(nn.Module):
    """`network`, given some channels of what comes in; `is_trained` where it brought its weights along."""

    def __init__(self, network: nn.Module, channels: list[int], *, is_trained: bool) -> None:
        super().__init__()
        self.network, self.channels, self.is_trained = network, channels, is_trained

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B,K] of images [B,C,H,W] of all sensors."""
        logits: Tensor = self.network(x[:, self.channels])
        return logits
