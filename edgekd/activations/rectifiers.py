"""The activations that LMA is compared with, as its paper used them (Xu et al., AAAI-20): ReLU, PReLU, Swish, APLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.errors import RecipeError
from edgekd.registry import register


@register("activation")
def relu(channels: int) -> nn.Module:
    """Rectified linear unit, `max(0, x)`."""
    del channels
    return nn.ReLU()


@register("activation")
def prelu(channels: int) -> nn.Module:
    """Parametric ReLU: one learned slope per layer for negative inputs, 0.25 at first (He et al., ICCV-15)."""
    del channels
    return nn.PReLU()


@register("activation")
def swish(channels: int) -> nn.Module:
    """Swish, `x * sigmoid(beta * x)` with one learned beta per channel, 1 at first (Ramachandran et al., 2017)."""
    return Swish(channels)


@register("activation")
def aplu(channels: int, *, k: int = 8) -> nn.Module:
    """Adaptive piecewise linear unit: ReLU and k - 2 learned hinges per channel (Agostinelli et al., ICLR-15).

    Raises:
        RecipeError: `k` is below 3.
    """
    if k < 3:
        raise RecipeError(
            f"activation aplu: k = {k} leaves no hinge",
            allowed="k: a whole number of at least 3; APLU-k has k - 2 hinges",
            fix='set k = 8, or use the activation "relu"',
        )
    return APLU(channels, k)


class Swish(nn.Module):
    """`x * sigmoid(beta * x)`; see `swish`. Inputs are [B, C, ...]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...]."""
        return x * torch.sigmoid(_per_channel(self.beta, x) * x)


class APLU(nn.Module):
    """`max(0, x) + sum_j a_j * max(0, b_j - x)`, a and b [k - 2, C]. Inputs are [B, C, ...].

    a ~ U(-0.5, 0.5); b ~ N(0, 0.5), where 0.5 is read as the standard deviation [R].
    """

    def __init__(self, channels: int, k: int) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.empty(k - 2, channels).uniform_(-0.5, 0.5))
        self.hinges = nn.Parameter(torch.empty(k - 2, channels).normal_(0, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...]."""
        y = torch.relu(x)
        for slope, hinge in zip(self.slopes, self.hinges, strict=True):
            y = y + _per_channel(slope, x) * torch.relu(_per_channel(hinge, x) - x)
        return y


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))
