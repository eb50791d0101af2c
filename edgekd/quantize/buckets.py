"""Uniform quantization of weights in buckets: each bucket of a flattened tensor has a range of its own.

Polino, Pascanu, Alistarh: "Model compression via distillation and quantization", ICLR 2018, with linear scaling and
deterministic rounding. For a bucket v with c = min(v), a = max(v) - c, and s = 2^bits levels:

    Q(v) = c + a round((v - c) / a (s - 1)) / (s - 1)

It is computed as `minimum + code * step` with step = a / (s - 1): the same up to the last bit, and what a runtime has
to do to unpack it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The authors give a bucket of equal values the range 1, as here; all its codes are 0.
SMALLEST_RANGE = 1e-10


class Buckets(NamedTuple):
    """A tensor as codes; `values` undoes it, but for the rounding."""

    codes: Tensor  # whole numbers in float32 [N, bucket], 0 to 2^bits - 1
    step: Tensor  # float32 [N, 1]: what one code is worth
    minimum: Tensor  # float32 [N, 1]
    shape: torch.Size

    def values(self) -> Tensor:
        """Q of the tensor, float32, in its shape."""
        rows = self.minimum + self.codes * self.step
        return rows.flatten()[: self.shape.numel()].reshape(self.shape)


def encode(weight: Tensor, bits: int, bucket: int) -> Buckets:
    """Quantize any tensor. The last bucket is filled up with the last value, which leaves its range as it is."""
    flat = weight.detach().flatten().float()
    n = flat.numel()
    # A tensor below one bucket is one. An even number of codes: two of 4 bits share a byte.
    size = min(bucket, n + n % 2)
    rows = torch.cat((flat, flat[-1:].expand(-n % size))).view(-1, size)
    low, high = rows.aminmax(dim=1, keepdim=True)
    width = high - low
    width = torch.where(width > SMALLEST_RANGE, width, torch.ones_like(width))
    largest = 2**bits - 1
    return Buckets(((rows - low) / width * largest).round(), width / largest, low, weight.shape)


class Rounded(nn.Module):
    """A parametrization: Q of a weight, of its shape and dtype; the gradient passes straight through to the weight."""

    def __init__(self, bits: int, bucket: int) -> None:
        super().__init__()
        self.bits, self.bucket = bits, bucket

    def forward(self, weight: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        rounded: Tensor = _StraightThrough.apply(weight, self.bits, self.bucket)
        return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, bucket: int) -> Tensor:
        return encode(weight, bits, bucket).values().to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None
