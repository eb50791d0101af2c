"""Adversarial images: small changes that raise a network's loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Attacks are given in these steps of the 8-bit pixel scale, as papers write them: 8 is 8/255.
PIXEL = 1 / 255


@dataclass(frozen=True)
class Ball:
    """The images within `epsilon` of one in every pixel, that are still images; normalised, [C, 1, 1] each."""

    epsilon: Tensor
    step_size: Tensor
    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, epsilon: float, step_size: float, mean: Tensor, std: Tensor) -> Ball:
        """Epsilon and step size in units of 1/255, for images normalised by mean and std [C, 1, 1]."""
        return cls(epsilon * PIXEL / std, step_size * PIXEL / std, -mean / std, (1 - mean) / std)

    def nearest(self, adversarial: Tensor, x: Tensor) -> Tensor:
        """`adversarial`, brought back into the ball around x."""
        inside = adversarial.minimum(x + self.epsilon).maximum(x - self.epsilon)
        return inside.maximum(self.lowest).minimum(self.highest)


def pgd(loss: Callable[[Tensor], Tensor], x: Tensor, ball: Ball, steps: int) -> Tensor:
    """Projected gradient descent: images [B, C, H, W] in the ball around x that raise `loss`, without gradient.

    Madry, Makelov, Schmidt, Tsipras, Vladu, ICLR 2018: from a random start, `steps` times a step along the sign of the
    gradient, and back into the ball.
    """
    adversarial = ball.nearest(x + (2 * torch.rand_like(x) - 1) * ball.epsilon, x)
    for _ in range(steps):
        adversarial.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(adversarial), adversarial)
        adversarial = ball.nearest(adversarial.detach() + ball.step_size * gradient.sign(), x)
    return adversarial


@contextlib.contextmanager
def evaluating(network: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The network in evaluation mode: an attack moves no statistics and meets no dropout."""
    was_training = isinstance(network, nn.Module) and network.training
    if isinstance(network, nn.Module):
        network.eval()
    try:
        yield
    finally:
        if isinstance(network, nn.Module):
            network.train(was_training)


def robust_accuracy(network: nn.Module, x: Tensor, y: Tensor, ball: Ball, steps: int) -> float:
    """The share of the images x [B, C, H, W] that are still told right, y [B], after `pgd` on the cross-entropy."""
    with evaluating(network):
        adversarial = pgd(lambda images: F.cross_entropy(network(images), y), x, ball, steps)
        with torch.no_grad():
            return float((network(adversarial).argmax(1) == y).float().mean())
