"""Discriminators: small networks that play against the student, and that it meets without moving them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

SLOPE, LEARNING_RATE, BETAS = 0.2, 2e-4, (0.5, 0.999)


def discriminator(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Module:
    """An MLP with leaky ReLUs, [B, inputs] to [B, outputs]: above 0 for what it takes for the teacher's."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size), nn.LeakyReLU(SLOPE)]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def judged(judge: nn.Module, x: Tensor) -> Tensor:
    """What the discriminator makes of x, with a gradient to x and none to the discriminator."""
    answer: Tensor = functional_call(judge, {name: value.detach() for name, value in judge.named_parameters()}, x)
    return answer


def moved_by_adam(judges: nn.Module, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Their own optimiser."""
    return torch.optim.Adam(judges.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=weight_decay)
