"""LMA as one ONNX operator: the model-local function `edgekd.LMA`.

A runtime that knows `edgekd.LMA` can run its own fused kernel; every other one inlines the function's body, which is
made of standard operators and is the form `step_gemm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DOMAIN = "edgekd"
_ONNX = """
<domain: "%s", opset_import: ["": %d]>
LMA (x, cuts, slopes, biases) => (y) {
    row = Constant <value_ints = [1, -1]> ()
    column = Constant <value_ints = [-1, 1]> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    end = Constant <value_ints = [2147483647]> ()
    flat = Reshape (x, row)
    cut_column = Reshape (cuts, column)
    is_above = Greater (flat, cut_column)
    above = CastLike (is_above, x)
    left_slopes = Slice (slopes, first, last)
    right_slopes = Slice (slopes, second, end)
    slope_steps = Sub (right_slopes, left_slopes)
    slope_row = Reshape (slope_steps, row)
    first_slope = Slice (slopes, first, second)
    slope = Gemm (slope_row, above, first_slope)
    left_biases = Slice (biases, first, last)
    right_biases = Slice (biases, second, end)
    bias_steps = Sub (right_biases, left_biases)
    bias_row = Reshape (bias_steps, row)
    first_bias = Slice (biases, first, second)
    bias = Gemm (bias_row, above, first_bias)
    scaled = Mul (slope, flat)
    sum = Add (scaled, bias)
    shape = Shape (x)
    y = Reshape (sum, shape)
}
"""


def call_function(x: Tensor, cuts: Tensor, slopes: Tensor, biases: Tensor) -> Tensor:
    """The call, while torch.onnx.export runs: any shape -> the same shape."""
    return torch.onnx.ops.symbolic(f"{DOMAIN}::LMA", (x, cuts, slopes, biases), dtype=x.dtype, shape=x.shape, version=1)


def add_function(model: Any) -> None:
    """Give an exported onnx.ModelProto the body of `edgekd.LMA`, in place, if it calls it."""
    import onnx.parser

    if any(node.domain == DOMAIN for node in model.graph.node):
        opset = next(entry.version for entry in model.opset_import if not entry.domain)
        model.functions.append(onnx.parser.parse_function(_ONNX % (DOMAIN, opset)))
