"""How large a network is and how much it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from edgekd.data import Shape


def count_params(network: nn.Module) -> int:
    """Number of parameters; one that is used in several places counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, shape: Shape) -> int:
    """Multiply-accumulates of one image through convolutions, linear layers and matrix products, biases left out."""
    with probing(network), FlopCounterMode(display=False) as counter:
        network(example_of(network, shape, batch=1))
    return int(counter.get_total_flops()) // 2


def example_of(network: nn.Module, shape: Shape, batch: int = 2) -> torch.Tensor:
    """Noise of the data's shape, float32 [B,C,H,W] on the network's device; the same at every call."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    size = (batch, *shape.dimensions)
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)


@contextmanager
def probing(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the mode that it had."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
