"""LMA as plain graphs of standard ONNX operators (opset 18 and up): one function in several spellings.

At test time the cuts are constants, so a layer is a fixed piecewise linear function. How fast it runs depends on what a
runtime makes of the operators; `benchmarks/lma_onnx.py` measures it. With d_j = slopes[j+1] - slopes[j],
e_j = biases[j+1] - biases[j] and c_j = cuts[j]:

    y = slopes[0] x + biases[0] + sum_j [x > c_j] (d_j x + e_j)            any segments
    y = slopes[0] x + biases[0] + sum_j d_j (max(x, c_j) - c_j)            segments that meet

The `_gemm` forms take these sums as one matrix product, so that a runtime without fusion makes 3 or 4 wide passes over
memory and not 3 for each segment.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edgekd.activations.function import call_function
from edgekd.activations.lma import Segments, multi_segment_layers
from edgekd.errors import RecipeError, unknown


@dataclass(frozen=True)
class Constants:
    """The numbers of one layer, as the eval mode of the network has them in float32."""

    cuts: list[float]  # [k - 1]
    slopes: list[float]  # [k]
    biases: list[float]  # [k]

    @property
    def slope_steps(self) -> list[float]:
        """d [k - 1]."""
        return [right - left for left, right in itertools.pairwise(self.slopes)]

    @property
    def bias_steps(self) -> list[float]:
        """e [k - 1]."""
        return [right - left for left, right in itertools.pairwise(self.biases)]

    @property
    def width(self) -> float:
        """That of an inner segment; all have the same, and 1 stands for that of none."""
        return self.cuts[1] - self.cuts[0] if len(self.cuts) > 1 else 1.0

    @property
    def offset(self) -> float:
        """What the sum of `d_j max(x, c_j)` lacks of y, next to `slopes[0] x`."""
        return self.biases[0] - sum(step * cut for step, cut in zip(self.slope_steps, self.cuts, strict=True))


def clip_sum(x: Tensor, c: Constants) -> Tensor:
    """Sum over the segments of slope times the part of x that lies in the segment."""
    low, high = [None, *c.cuts], [*c.cuts, None]
    y = c.slopes[0] * x.clamp(max=high[0])
    for j in range(1, len(c.slopes)):
        y = y + c.slopes[j] * x.clamp(low[j], high[j])
    return y + (c.biases[0] - sum(slope * cut for slope, cut in zip(c.slopes[1:], c.cuts, strict=True)))


def relu_sum(x: Tensor, c: Constants) -> Tensor:
    """A line plus one scaled ReLU per cut."""
    y = c.slopes[0] * x + c.biases[0]
    for cut, step in zip(c.cuts, c.slope_steps, strict=True):
        y = y + step * torch.relu(x - cut)
    return y


def max_gemm(x: Tensor, c: Constants) -> Tensor:
    """Max with all cuts at once, [k, n]; then one matrix product that weighs and sums them."""
    lowest = torch.finfo(x.dtype).min  # max(x, lowest) is x: the line is a row like the others
    wide = torch.maximum(x.reshape(1, -1), x.new_tensor([lowest, *c.cuts])[:, None])
    return torch.addmm(x.new_tensor([[c.offset]]), x.new_tensor([[c.slopes[0], *c.slope_steps]]), wide).reshape(x.shape)


def step_sum(x: Tensor, c: Constants) -> Tensor:
    """A line plus one compared and scaled line per cut."""
    y = c.slopes[0] * x + c.biases[0]
    for cut, slope, bias in zip(c.cuts, c.slope_steps, c.bias_steps, strict=True):
        y = y + (x > cut).to(x.dtype) * (slope * x + bias)
    return y


def where(x: Tensor, c: Constants) -> Tensor:
    """Nested Where that picks slope and bias."""
    slope, bias = x.new_tensor(c.slopes[0]), x.new_tensor(c.biases[0])
    for j, cut in enumerate(c.cuts, start=1):
        above = x > cut
        slope = torch.where(above, x.new_tensor(c.slopes[j]), slope)
        bias = torch.where(above, x.new_tensor(c.biases[j]), bias)
    return slope * x + bias


def gather(x: Tensor, c: Constants) -> Tensor:
    """Index by the equal width of the segments, then two look-ups."""
    flat = x.reshape(-1)
    index = _number(flat, c).clamp(0, len(c.cuts)).long()
    slope, bias = x.new_tensor(c.slopes).index_select(0, index), x.new_tensor(c.biases).index_select(0, index)
    return (slope * flat + bias).reshape(x.shape)


def number_sum(x: Tensor, c: Constants) -> Tensor:
    """The number of the segment by the equal width; slope and bias are sums of maxima and minima of it."""
    middle = len(c.slopes) // 2
    below = torch.minimum(x, x.new_tensor(c.cuts[-1] + c.width / 2))
    # From the middle, terms that cancel stay small.
    number = torch.maximum(_number(below, c) - float(middle), x.new_tensor(float(-middle)))
    bends = [torch.maximum(number, x.new_tensor(float(at))) for at in range(len(c.cuts) - middle)]
    bends += [torch.minimum(number, x.new_tensor(float(-at))) for at in range(1, middle)]

    def looked_up(values: list[float], steps: list[float]) -> Tensor:
        right = [steps[at] - steps[at - 1] for at in range(middle, len(steps))]
        left = [steps[at] - steps[at + 1] for at in range(middle - 2, -1, -1)]
        offset = sum(at * bend for at, bend in enumerate(right)) - sum(at * bend for at, bend in enumerate(left, 1))
        y = steps[middle - 1] * number + (values[middle] - offset)
        for bend, value in zip([*right, *left], bends, strict=True):
            y = y + bend * value
        return y

    return looked_up(c.slopes, c.slope_steps) * x + looked_up(c.biases, c.bias_steps)


def _number(x: Tensor, c: Constants) -> Tensor:
    """That of the segment, or less than 0 and more than k - 1; at a cut as exact as the multiplication is."""
    return torch.ceil((x - c.cuts[0]) * (1 / c.width))


def step_gemm(x: Tensor, c: Constants) -> Tensor:
    """Compare with all cuts at once, [k - 1, n]; one matrix product gives the slopes and one the biases."""
    flat = x.reshape(1, -1)
    above = (flat > x.new_tensor(c.cuts)[:, None]).to(x.dtype)
    slope = torch.addmm(x.new_tensor([[c.slopes[0]]]), x.new_tensor([c.slope_steps]), above)
    bias = torch.addmm(x.new_tensor([[c.biases[0]]]), x.new_tensor([c.bias_steps]), above)
    return (slope * flat + bias).reshape(x.shape)


def function(x: Tensor, c: Constants) -> Tensor:
    """One call of the model-local function `edgekd.LMA`, to which `add_function` gives `step_gemm` as its body."""
    if not torch.onnx.is_in_onnx_export():
        return step_gemm(x, c)
    return call_function(x, x.new_tensor(c.cuts), x.new_tensor(c.slopes), x.new_tensor(c.biases))


@dataclass(frozen=True)
class Form:
    """A spelling: [...] -> [...]; `exact_for` says which segments it can express."""

    apply: Callable[[Tensor, Constants], Tensor]
    exact_for: Literal["any", "continuous"]


FORMS: dict[str, Form] = {
    **{form.__name__: Form(form, "continuous") for form in (clip_sum, relu_sum, max_gemm)},
    **{form.__name__: Form(form, "any") for form in (step_sum, number_sum, where, gather, step_gemm, function)},
}


def default_form(continuous: bool) -> str:
    """The fastest form of standard operators in ONNX Runtime on a CPU."""
    return "max_gemm" if continuous else "step_gemm"


class FrozenLMA(nn.Module):
    """An LMA layer with constant segments, in one of the forms: any shape -> the same shape."""

    def __init__(self, segments: Segments, form: str) -> None:
        super().__init__()
        self.form = form
        # Constants are derived in float64, from the float32 numbers that eval mode uses.
        self.constants = Constants(*(values.detach().cpu().double().tolist() for values in segments))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return FORMS[self.form].apply(x, self.constants)

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"form={self.form}, k={len(self.constants.slopes)}"


def frozen(network: nn.Module, form: str) -> nn.Module:
    """A copy of the network in eval mode, each LMA layer written out in `form`: ready for torch.onnx.export.

    Raises:
        RecipeError: no such form, or one that cannot express a layer whose segments do not meet.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS, noun="ONNX form of LMA")
    network = copy.deepcopy(network).eval()
    for name, layer in list(multi_segment_layers(network)):
        if FORMS[form].exact_for == "continuous" and not layer.continuous:
            raise RecipeError(
                f'form "{form}" cannot express the jumps of LMA layer "{name}"',
                allowed=f"for any LMA: {', '.join(sorted(n for n, f in FORMS.items() if f.exact_for == 'any'))}",
                fix=f'use the form "{default_form(continuous=False)}", or train LMA with continuous = true',
            )
        spelled_out = FrozenLMA(layer.segments(), form)
        if not name:
            return spelled_out.eval()
        parent, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(parent), attribute, spelled_out.eval())
    return network
