"""What methods that make the student smaller share: groups of weights that go together, and how to shrink them.

A group is a channel of the network with all that belongs to it: its filters in every layer that adds to it, scale and
shift of its batch normalisation, and the weights that read it (the dependency groups of Fang, Ma, Song, Mi, Wang,
"DepGraph", CVPR 2023). When they are 0 the channel can be removed without a change of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from edgekd.networks.channels import coupled_channels, is_depthwise, is_mixer


class Prunable(Protocol):
    """What is pruned together: the groups of a network's weights, and of those of any other one of the same making."""

    count: int

    def shrink(self, network: nn.Module, threshold: float) -> None:
        """The proximal step of threshold times the penalty, in place."""

    def strength(self, network: nn.Module) -> Tensor:
        """How much each group matters, float32 [G]; 0 for those that are 0."""

    def strongest(self, strength: Tensor, share: float) -> Tensor:
        """float32 [G]: 0 for this share of the groups, those of the least `strength` [G], and 1 for the others."""

    def scale(self, network: nn.Module, factors: Tensor) -> None:
        """Multiply the weights of each group by its factor [G], in place."""


class ChannelGroups:
    """The channels of a network; a weight lies in the group of the channel that it gives and of that which it reads."""

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        groups = coupled_channels(network, example)
        self.count, self.device = len(groups), example.device
        # By parameter and dimension: the group of each index there, or `count` where it is in none.
        self._of: dict[tuple[str, int], Tensor] = {}
        modules = dict(network.named_modules())
        for number, group in enumerate(groups):
            for path, places in group.outputs.items():
                for name, _ in modules[path].named_parameters(prefix=path, recurse=False):
                    self._index(network, name, 0)[places] = number
            for path, places in group.inputs.items():
                if is_mixer(modules[path]) and not is_depthwise(modules[path]):
                    index = self._index(network, f"{path}.weight", 1)
                    index[[place for place in places if place < len(index)]] = number  # groups of a kernel are alike
        self.sizes = self._sums(network, torch.ones_like)

    def shrink(self, network: nn.Module, threshold: float) -> None:
        """See `Prunable`; the penalty is sqrt(n_g) ||w_g||."""
        if threshold:
            self.scale(network, group_factors(self.norms(network), self.sizes, threshold))

    def strength(self, network: nn.Module) -> Tensor:
        """The root mean square of each group's weights."""
        return self.norms(network) / self.sizes.sqrt()

    def norms(self, network: nn.Module) -> Tensor:
        """The Euclidean norm of each group's weights, float32 [G]."""
        return self._sums(network, torch.square).sqrt()

    def strongest(self, strength: Tensor, share: float) -> Tensor:
        """See `Prunable`; a layer keeps its strongest channel."""
        kept = _largest(strength, share)
        for (_, dim), index in self._of.items():
            own = index[index < self.count]
            if dim == 0 and len(own) == len(index) and not kept[own].any():
                kept[own[strength[own].argmax()]] = 1
        return kept

    def scale(self, network: nn.Module, factors: Tensor) -> None:
        """See `Prunable`."""
        factors = torch.cat([factors, factors.new_ones(1)])
        with torch.no_grad():
            for (name, dim), index in self._of.items():
                parameter = network.get_parameter(name)
                wide = [1] * parameter.ndim
                wide[dim] = -1
                parameter.mul_(factors[index].view(wide))

    def _index(self, network: nn.Module, name: str, dim: int) -> Tensor:
        length = network.get_parameter(name).shape[dim]
        return self._of.setdefault((name, dim), torch.full((length,), self.count, device=self.device))

    def _sums(self, network: nn.Module, of: Callable[[Tensor], Tensor]) -> Tensor:
        sums = torch.zeros(self.count + 1, device=self.device)
        for (name, dim), index in self._of.items():
            values = of(network.get_parameter(name).detach().float()).movedim(dim, 0)
            sums.index_add_(0, index, values.flatten(1).sum(1) if values.ndim > 1 else values)
        return sums[:-1]


class SingleWeights:
    """The weights of convolutions and linear layers, each for itself; biases and scales are none of them."""

    def __init__(self, network: nn.Module) -> None:
        self.names = [f"{path}.weight" for path, module in network.named_modules() if is_mixer(module)]
        self.count = sum(network.get_parameter(name).numel() for name in self.names)

    def shrink(self, network: nn.Module, threshold: float) -> None:
        """See `Prunable`; the penalty is |w|."""
        with torch.no_grad():
            for name in self.names:
                weight = network.get_parameter(name)
                weight.copy_(soft_threshold(weight, threshold))

    def strength(self, network: nn.Module) -> Tensor:
        """The absolute value of each weight."""
        return torch.cat([network.get_parameter(name).detach().abs().flatten() for name in self.names])

    def strongest(self, strength: Tensor, share: float) -> Tensor:
        """See `Prunable`."""
        return _largest(strength, share)

    def scale(self, network: nn.Module, factors: Tensor) -> None:
        """See `Prunable`."""
        start = 0
        with torch.no_grad():
            for name in self.names:
                weight = network.get_parameter(name)
                weight.mul_(factors[start : start + weight.numel()].view_as(weight))
                start += weight.numel()


def _largest(strength: Tensor, share: float) -> Tensor:
    kept = torch.zeros_like(strength)
    kept[strength.argsort(descending=True, stable=True)[: len(strength) - round(share * len(strength))]] = 1
    return kept


def soft_threshold(weight: Tensor, threshold: float) -> Tensor:
    """The proximal operator of threshold |w|: sign(w) max(|w| - threshold, 0)."""
    return weight.sign() * (weight.abs() - threshold).clamp_min(0)


def group_factors(norms: Tensor, sizes: Tensor, threshold: float) -> Tensor:
    """Proximal operator of t sqrt(n_g) ||w_g||: it multiplies w_g by: max(1 - t sqrt(n_g) / ||w_g||, 0)."""
    return (1 - threshold * sizes.sqrt() / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
