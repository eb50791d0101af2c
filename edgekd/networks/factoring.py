"""Convolutions of low rank as three smaller ones: 1x1 into fewer channels, the kernel among those, 1x1 out of them.

A weight [O, I, h, w] whose outputs span r dimensions and whose inputs span q is U (U^T W V) V^T with orthonormal
U [O, r] and V [I, q] (a Tucker decomposition over the channels: De Lathauwer, De Moor, Vandewalle, SIAM J. Matrix Anal.
Appl. 21(4), 2000). The three compute the same, at the borders too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from edgekd.networks.counts import probing

# Singular values below this share of the largest are rounding.
NEGLIGIBLE = 1e-5


class FactoredConv(nn.Sequential):
    """A convolution as two or three, which tells its channels as one."""

    @property
    def in_channels(self) -> int:
        """C of the maps that it reads."""
        return self[0].get_parameter("weight").shape[1]

    @property
    def out_channels(self) -> int:
        """C of the maps that it gives."""
        return self[-1].get_parameter("weight").shape[0]


def can_be_factored(module: nn.Module) -> bool:
    """Whether it is a plain two-dimensional convolution whose padding, if any, is zeros."""
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"


def cheapest(conv: nn.Conv2d, q: int, r: int, areas: tuple[int, int]) -> tuple[int, int, float]:
    """Which of the two sides of a convolution of ranks q and r are worth factoring, and the MACs of one image then.

    areas: sites of the map that it reads, and of that which it gives. A side that is not factored keeps its channels.
    """
    before, after = areas
    kernel = math.prod(conv.kernel_size)
    inputs, outputs = conv.in_channels, conv.out_channels

    def macs(q: int, r: int) -> float:
        into = before * inputs * q if q < inputs else 0
        return into + after * (q * r * kernel + (r * outputs if r < outputs else 0))

    choices = [(inputs, outputs), (inputs, r), (q, outputs), (q, r)]
    best = min(choices, key=lambda ranks: macs(*ranks))
    return (*best, macs(*best))


def ranks_of(network: nn.Module, example: Tensor | None) -> dict[str, list[int]]:
    """The convolutions that are cheaper when factored, by path: how many channels [q, r] are left inside.

    example: float32 [B, C, H, W]; None takes all maps for equally large.
    """
    areas = {} if example is None else map_areas(network, example)
    found = {}
    for path, conv in network.named_modules():
        if not can_be_factored(conv) or (example is not None and path not in areas):
            continue
        assert isinstance(conv, nn.Conv2d)
        weight = conv.weight.detach().double()
        q, r = (_rank(side.flatten(1)) for side in (weight.transpose(0, 1), weight))
        q, r, _ = cheapest(conv, q, r, areas.get(path, (1, 1)))
        if (q, r) != (conv.in_channels, conv.out_channels):
            found[path] = [q, r]
    return found


def map_areas(network: nn.Module, example: Tensor) -> dict[str, tuple[int, int]]:
    """By path of each convolution that is called: sites of the map that it reads, and of that which it gives."""
    areas: dict[str, tuple[int, int]] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, x, y, path=path: areas.__setitem__(path, (x[0].shape[2:].numel(), y.shape[2:].numel()))
        )
        for path, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with probing(network):
        network(example[:1])
    for hook in hooks:
        hook.remove()
    return areas


def factor(conv: nn.Module, q: int, r: int) -> FactoredConv:
    """The convolution with q channels before its kernel and r behind it; a side with all its channels has no 1x1.

    Exact where its weight has these ranks, and the nearest in each side's own right elsewhere.
    """
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight.detach().double()
    return FactoredConv(*_parts(conv, weight, q, r)).train(conv.training)


def _parts(conv: nn.Conv2d, weight: Tensor, q: int, r: int) -> Iterator[nn.Conv2d]:
    outputs = torch.linalg.svd(weight.flatten(1), full_matrices=False)[0][:, :r]
    inputs = torch.linalg.svd(weight.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :q]
    last = r < conv.out_channels
    if q < conv.in_channels:
        yield _conv(inputs.T[:, :, None, None])
        weight = torch.einsum("oihw,iq->oqhw", weight, inputs)
    if last:
        weight = torch.einsum("oihw,or->rihw", weight, outputs)
    core = _conv(weight, None if last else conv.bias)
    core.stride, core.padding, core.dilation = conv.stride, conv.padding, conv.dilation
    yield core
    if last:
        yield _conv(outputs[:, :, None, None], conv.bias)


def _conv(weight: Tensor, bias: Tensor | None = None) -> nn.Conv2d:
    outputs, inputs, *kernel = weight.shape
    made = nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]), bias=bias is not None)
    made.weight = nn.Parameter(weight.float())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


def _rank(matrix: Tensor) -> int:
    values = torch.linalg.svdvals(matrix)
    return max(1, int((values > NEGLIGIBLE * values[0]).sum()))
