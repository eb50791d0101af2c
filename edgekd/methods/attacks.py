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
# How far beyond the boundary a boundary sample aims, in logits; and what keeps a flat network from dividing by 0.
BEYOND, SMALLEST_GRADIENT = 1e-4, 1e-12


def limits(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """What black and white are, for images normalised by mean and std [C, 1, 1]."""
    return -mean / std, (1 - mean) / std


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
        return cls(epsilon * PIXEL / std, step_size * PIXEL / std, *limits(mean, std))

    def nearest(self, adversarial: Tensor, x: Tensor) -> Tensor:
        """`adversarial`, brought back into the ball around x."""
        inside = adversarial.minimum(x + self.epsilon).maximum(x - self.epsilon)
        return inside.maximum(self.lowest).minimum(self.highest)


def random_start(x: Tensor, ball: Ball) -> Tensor:
    """Images drawn uniformly from the ball around x [B, C, H, W]."""
    return ball.nearest(x + (2 * torch.rand_like(x) - 1) * ball.epsilon, x)


def pgd(loss: Callable[[Tensor], Tensor], x: Tensor, ball: Ball, steps: int) -> Tensor:
    """Projected gradient descent: images [B, C, H, W] in the ball around x that raise `loss`, without gradient.

    Madry, Makelov, Schmidt, Tsipras, Vladu, ICLR 2018: from a random start, `steps` times a step along the sign of the
    gradient, and back into the ball.
    """
    adversarial = random_start(x, ball)
    for _ in range(steps):
        adversarial.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(adversarial), adversarial)
        adversarial = ball.nearest(adversarial.detach() + ball.step_size * gradient.sign(), x)
    return adversarial


def boundary(
    network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, target: Tensor, lowest: Tensor, highest: Tensor,
    step_size: float, steps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Images [B, C, H, W] led from their class y [B] towards `target` [B] until the network turns; and who turned, [B].

    Heo et al., AAAI 2019, and their code: with L = f_y - f_target of the logits f, at most `steps` times

        x <- x - step_size (L + epsilon) grad L / ||grad L||,      within the images from `lowest` to `highest`

    An image whose top class is no longer y stays as it is, whichever class it turned to.
    """
    attacked, turned = x.detach().clone(), torch.zeros_like(y, dtype=torch.bool)
    for _ in range(steps):
        attacked.requires_grad_()
        with torch.enable_grad():
            logits = network(attacked)
            lead = (logits.gather(1, y[:, None]) - logits.gather(1, target[:, None]))[:, 0]
            (gradient,) = torch.autograd.grad(lead.sum(), attacked)
        turned = logits.argmax(1) != y
        length = gradient.flatten(1).norm(dim=1).clamp(min=SMALLEST_GRADIENT)
        move = (step_size * (lead.detach() + BEYOND) / length * ~turned).view(-1, 1, 1, 1)
        attacked = (attacked.detach() - move * gradient).maximum(lowest).minimum(highest)
    with torch.no_grad():
        turned = network(attacked).argmax(1) != y
    return attacked, turned


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


def withstood(network: nn.Module, x: Tensor, y: Tensor, ball: Ball, steps: int) -> Tensor:
    """Which of the images x [B, C, H, W] are still told right, y [B], after `pgd` on the cross-entropy: bool [B]."""
    with evaluating(network):
        adversarial = pgd(lambda images: F.cross_entropy(network(images), y), x, ball, steps)
        with torch.no_grad():
            right: Tensor = network(adversarial).argmax(1) == y
            return right
