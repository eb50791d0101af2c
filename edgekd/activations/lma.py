"""LMA, the light multi-segment activation (Xu, Ke, Zhang, Bian, Liu; AAAI-20; arXiv 1907.06870, section 3).

A layer's inputs are cut into k segments of equal width over mean +- 3 standard deviations of the batch, and each
segment has its own slope and bias, shared by the whole layer: 2k parameters. Where this differs from the authors' code:
the statistics are buffers, `eval()` changes nothing, the first batch sets the moving average, the deviation has a
floor, and a value at a cut belongs to the left segment, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from edgekd.activations.segments import apply_segments, mean_std
from edgekd.errors import RecipeError
from edgekd.registry import register

_RANGE = 3.0  # the cuts cover this many standard deviations on each side of the mean
_STD_FLOOR = 1e-5


@register("activation")
def lma(channels: int, *, k: int = 8, momentum: float = 0.99, continuous: bool = False) -> nn.Module:
    """Light multi-segment activation: k learned linear segments per layer (Xu et al., AAAI-20).

    Args:
        channels: not used; the parameters are shared by the whole layer.
        k: number of segments, even.
        momentum: what the moving average of mean and standard deviation keeps per batch.
        continuous: derive the biases so that neighbouring segments meet; the slopes and one offset are learned.

    Raises:
        RecipeError: `k` is not an even number of at least 2, or `momentum` is outside [0, 1).
    """
    del channels
    if k < 2 or k % 2:
        raise RecipeError(
            f"activation lma: k = {k} does not split the range around the mean into two equal halves",
            allowed="k: an even number of at least 2; the paper uses 4 to 12",
            fix="set k = 8",
        )
    if not 0 <= momentum < 1:
        raise RecipeError(
            f"activation lma: momentum = {momentum} is not a share of the past to keep",
            allowed="momentum: at least 0 and below 1",
            fix="set momentum = 0.99",
        )
    return LMA(k=k, momentum=momentum, continuous=continuous)


class Segments(NamedTuple):
    """`y = slopes[j] * x + biases[j]` for x in `(cuts[j-1], cuts[j]]`; the outer segments are open."""

    cuts: Tensor  # [k - 1]
    slopes: Tensor  # [k]
    biases: Tensor  # [k]


class LMA(nn.Module):
    """The layer; see `lma`. Inputs of any shape; all its elements share one set of segments.

    At first it is ReLU with its kink at the mean of the batch. A batch that is not finite passes through (a NaN stays a
    NaN, so that the loss shows it) and leaves the moving average as it was.

    Attributes:
        slope_deltas: [k], what is learned on top of the slopes 0, .., 0, 1, .., 1: weight decay pulls towards ReLU.
        biases: [k]; with `continuous`, one value: the output at the middle cut.
        running: [2], moving average of mean and standard deviation, in at least float32.
        num_batches: how many batches it has seen.
        statistics_frozen: in training, use the moving average and leave it as it is, as `eval()` does.
    """

    slope_deltas: nn.Parameter
    biases: nn.Parameter
    base_slopes: Tensor
    running: Tensor
    num_batches: Tensor

    def __init__(self, *, k: int, momentum: float, continuous: bool) -> None:
        super().__init__()
        self.k, self.momentum, self.continuous = k, momentum, continuous
        self.statistics_frozen = False
        self.slope_deltas = nn.Parameter(torch.zeros(k))
        self.biases = nn.Parameter(torch.zeros(1 if continuous else k))
        self.register_buffer("base_slopes", (torch.arange(k) >= k // 2).float(), persistent=False)
        self.register_buffer("running", torch.tensor([0.0, 1.0]))
        self.register_buffer("num_batches", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape and dtype."""
        learning = self.training and not self.statistics_frozen
        return apply_segments(x, *self.segments(self._update(x) if learning else self.running))

    def segments(self, statistics: Tensor | None = None) -> Segments:
        """The segments for (mean, std) [2]; without, those of the moving average, as at test time."""
        mean, std = (self.running if statistics is None else statistics).unbind()
        steps = torch.arange(1 - self.k // 2, self.k // 2, device=mean.device) * (2 * _RANGE / self.k)
        cuts = mean + steps.to(mean.dtype) * std.clamp(min=_STD_FLOOR)
        slopes = self.base_slopes + self.slope_deltas
        if not self.continuous:
            return Segments(cuts, slopes, self.biases)
        steps_at_cuts = (slopes[:-1] - slopes[1:]) * cuts
        rises = torch.cat((slopes.new_zeros(1), steps_at_cuts.cumsum(0)))  # biases that meet, up to one constant
        middle = self.k // 2
        at_middle = slopes[middle] * cuts[middle - 1] + rises[middle]
        return Segments(cuts, slopes, rises - at_middle + self.biases)

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"k={self.k}, momentum={self.momentum}, continuous={self.continuous}"

    @torch.no_grad()
    def _update(self, x: Tensor) -> Tensor:
        """Take the batch into the moving average; give the statistics that cut this batch."""
        batch = _over_all_ranks(mean_std(x, self.k), x.numel()).to(self.running.dtype)
        finite = batch.isfinite().all()  # stays on the device: no synchronisation
        weight = torch.where(self.num_batches == 0, 1.0, 1.0 - self.momentum).to(batch.dtype)
        self.running.copy_(torch.where(finite, self.running.lerp(batch, weight), self.running))
        self.num_batches += finite
        return torch.where(finite, batch, self.running)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.running
        super()._apply(fn, recurse)
        if self.running.dtype in (torch.float16, torch.bfloat16):
            # One percent of a batch is below half precision: the moving average would stand still.
            self.running = exact.to(self.running.device)
        return self


def multi_segment_layers(network: nn.Module) -> Iterator[tuple[str, LMA]]:
    """The LMA layers of a network with their names, in order of registration."""
    for name, module in network.named_modules():
        if isinstance(module, LMA):
            yield name, module


def freeze_statistics(network: nn.Module, frozen: bool = True) -> None:
    """Fix the cuts of every LMA layer, also in training; `frozen=False` lets them follow the batches again."""
    for _, layer in multi_segment_layers(network):
        layer.statistics_frozen = frozen


def _over_all_ranks(mean_std: Tensor, count: int) -> Tensor:
    """Merge (mean, std) [2] of `count` values with those of the other processes (Chan et al., 1979)."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mean_std
    mine = torch.cat((mean_std.new_tensor([count]), mean_std)).double()
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, mine)
    counts, means, stds = torch.stack(ranks).unbind(1)
    total = counts.sum()
    mean = (counts * means).sum() / total
    squares = ((counts - 1) * stds.square() + counts * (means - mean).square()).sum()
    return torch.stack((mean, (squares / (total - 1)).sqrt())).to(mean_std.dtype)
