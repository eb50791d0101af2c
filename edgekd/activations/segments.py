"""`y = slopes[j] * x + biases[j]` for x in `(cuts[j-1], cuts[j]]`, with its gradients: the arithmetic of LMA.

Straight-line code: k - 1 comparisons, no table look-up, no index tensor. Only `x` is kept for the backward pass, which
finds the segments again. The same function runs as
- one C kernel on the CPU (`kernel.py`),
- one Triton kernel on a GPU (`triton_kernel.py`),
- plain torch everywhere else: float64, no compiler, inside `torch.compile` and `torch.export`, second derivatives.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Protocol

import torch
from torch import Tensor

from edgekd.activations import kernel

_log = logging.getLogger(__name__)


class _Kernel(Protocol):
    def statistics(self, x: Tensor) -> Tensor: ...
    def forward(self, x: Tensor, cuts: Tensor, slopes: Tensor, biases: Tensor) -> Tensor: ...
    def backward(self, x: Tensor, grad: Tensor, cuts: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


def apply_segments(x: Tensor, cuts: Tensor, slopes: Tensor, biases: Tensor) -> Tensor:
    """Apply k linear segments to every element.

    Args:
        x: any shape. Half precision is computed in float32.
        cuts: [k - 1], ascending. A value at a cut belongs to the left segment. No gradient flows to it.
        slopes, biases: [k].

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    dtype = _at_least_float32(x.dtype)
    y: Tensor = _Segments.apply(x, cuts.to(dtype), slopes.to(dtype), biases.to(dtype))
    return y


def mean_std(x: Tensor, k: int) -> Tensor:
    """Mean and unbiased standard deviation over all elements of `x`, as [2] in at least float32, without gradient.

    A single value has standard deviation 0; no value at all has NaN.
    """
    fast = _kernel_for(x, k)
    if fast is not None:
        return fast.statistics(x.detach())
    values = x.detach().to(_at_least_float32(x.dtype))
    if values.numel() == 1:
        return torch.stack((values.sum(), values.new_zeros(())))
    mean = values.mean()
    return torch.stack((mean, (values - mean).square().sum().div(values.numel() - 1).sqrt()))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _kernel_for(x: Tensor, k: int) -> _Kernel | None:
    # Under a compiler the plain form is the fast one: it fuses with its neighbours.
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.dtype == torch.float64:
        return None
    if not x.is_contiguous(memory_format=_layout(x)):
        return None
    return kernel.load(k) if x.device.type == "cpu" else _triton() if x.is_cuda else None


@functools.cache
def _triton() -> _Kernel | None:
    try:
        from edgekd.activations.triton_kernel import TritonKernel
    except ImportError as error:
        _log.info("LMA trains with plain torch, slower than its Triton kernel: %s", error)
        return None
    return TritonKernel()


def _layout(x: Tensor) -> torch.memory_format:
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cuts: Tensor, slopes: Tensor, biases: Tensor) -> Tensor:
        ctx.save_for_backward(x, cuts, slopes)
        fast = _kernel_for(x, len(slopes))
        if fast is not None:
            return fast.forward(x, cuts.contiguous(), slopes.contiguous(), biases.contiguous())
        slope, bias = slopes[0].expand_as(x), biases[0].expand_as(x)
        values = x.to(slopes.dtype)
        for cut, slope_step, bias_step in zip(cuts, slopes.diff(), biases.diff(), strict=True):
            above = _above(values, cut)
            slope, bias = torch.addcmul(slope, above, slope_step), torch.addcmul(bias, above, bias_step)
        return torch.addcmul(bias, slope, values).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        (grad,) = grads
        x, cuts, slopes = ctx.saved_tensors
        # With create_graph=True this pass is itself differentiated, which only plain torch can record.
        fast = None if torch.is_grad_enabled() else _kernel_for(x, len(slopes))
        if fast is not None:
            aligned = grad.contiguous(memory_format=_layout(x))
            grad_x, grad_slopes, grad_biases = fast.backward(x, aligned, cuts.contiguous(), slopes.contiguous())
            return grad_x, None, grad_slopes, grad_biases
        values, grad = x.to(slopes.dtype), grad.to(slopes.dtype)
        slope, product = slopes[0].expand_as(x), grad * values
        slope_sums, bias_sums = [product.sum()], [grad.sum()]
        for cut, slope_step in zip(cuts, slopes.diff(), strict=True):
            above = _above(values, cut)
            slope = torch.addcmul(slope, above, slope_step)
            slope_sums.append((product * above).sum())
            bias_sums.append((grad * above).sum())
        return (grad * slope).to(x.dtype), None, _between(slope_sums), _between(bias_sums)


def _above(x: Tensor, cut: Tensor) -> Tensor:
    """1 above the cut, else 0. As a number: in eager torch on a CPU, arithmetic is many times faster than `where`."""
    return (x.detach() - cut).gt_(0)


def _between(sums: list[Tensor]) -> Tensor:
    """From sums over what is above each cut to sums over each segment: above its lower cut less above the next one."""
    above = torch.stack(sums)
    return above - torch.cat((above[1:], above.new_zeros(1)))
