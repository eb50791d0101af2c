"""The GPU kernel of LMA: one Triton kernel forward, one backward, with float32 arithmetic for every input dtype.

Imported only when a CUDA tensor meets LMA and Triton is there; without it plain torch does the work.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _forward(x_at, y_at, n, cuts_at, slopes_at, biases_at, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + at, mask=at < n, other=0.0).to(tl.float32)
    slope = tl.zeros_like(x) + tl.load(slopes_at)
    bias = tl.zeros_like(x) + tl.load(biases_at)
    for j in tl.static_range(1, K):
        above = x > tl.load(cuts_at + j - 1)
        slope = tl.where(above, tl.load(slopes_at + j), slope)
        bias = tl.where(above, tl.load(biases_at + j), bias)
    tl.store(y_at + at, (slope * x + bias).to(y_at.dtype.element_ty), mask=at < n)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(x_at, grad_at, grad_x_at, n, cuts_at, slopes_at, sums_at, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    block, blocks = tl.program_id(0), tl.num_programs(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_at + at, mask=at < n, other=0.0).to(tl.float32)
    grad = tl.load(grad_at + at, mask=at < n, other=0.0).to(tl.float32)  # zero beyond the end: adds nothing
    slope = tl.zeros_like(x) + tl.load(slopes_at)
    product = grad * x
    tl.store(sums_at + block, tl.sum(product, 0))
    tl.store(sums_at + K * blocks + block, tl.sum(grad, 0))
    for j in tl.static_range(1, K):
        above = x > tl.load(cuts_at + j - 1)
        slope = tl.where(above, tl.load(slopes_at + j), slope)
        tl.store(sums_at + j * blocks + block, tl.sum(tl.where(above, product, 0.0), 0))
        tl.store(sums_at + (K + j) * blocks + block, tl.sum(tl.where(above, grad, 0.0), 0))
    tl.store(grad_x_at + at, (grad * slope).to(grad_x_at.dtype.element_ty), mask=at < n)


class TritonKernel:
    """The same methods as the CPU's `Kernel`. `x` is dense, of any floating dtype; the tables are float32."""

    def statistics(self, x: Tensor) -> Tensor:
        """Mean and unbiased standard deviation over all of `x`, as a tensor [2] of float32."""
        std, mean = torch.std_mean(x.float(), correction=int(x.numel() > 1))
        return torch.stack((mean, std))

    def forward(self, x: Tensor, cuts: Tensor, slopes: Tensor, biases: Tensor) -> Tensor:
        """`slopes[j] * x + biases[j]`, shaped and laid out like `x`."""
        y = torch.empty_like(x)
        if blocks := triton.cdiv(x.numel(), _BLOCK):
            _forward[(blocks,)](x, y, x.numel(), cuts, slopes, biases, K=len(slopes), BLOCK=_BLOCK)
        return y

    def backward(self, x: Tensor, grad: Tensor, cuts: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients with respect to `x`, `slopes` [k] and `biases` [k]."""
        k, blocks, grad_x = len(slopes), triton.cdiv(x.numel(), _BLOCK), torch.empty_like(x)
        partial = torch.zeros(2, k, blocks, device=x.device)
        if blocks:
            _backward[(blocks,)](x, grad, grad_x, x.numel(), cuts, slopes, partial, K=k, BLOCK=_BLOCK)
        above = torch.nn.functional.pad(partial.double().sum(2), (0, 1))
        grad_slopes, grad_biases = (above[:, :-1] - above[:, 1:]).float()
        return grad_x, grad_slopes, grad_biases
