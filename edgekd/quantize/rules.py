"""What TensorRT takes of a Q/DQ graph, checked without TensorRT.

The rules are those of its headers (8.5 to 10) and of its parser and compiler: what they reject, and what they build and
then run in float without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.quantize.graph import HALF, PER_CHANNEL_OPSET, STANDARD_DOMAINS, Graph, Layer, attributes, lma_name

Array = npt.NDArray[Any]
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PAIR = ("QuantizeLinear", "DequantizeLinear")
_INTEGER_OPERATORS = (
    "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A node that TensorRT would reject, or run more slowly than meant."""

    node: str
    rule: str
    effect: Literal["rejected", "slow"]
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}; {self.fix}"


def check(model: onnx.ModelProto) -> list[Finding]:
    """All findings, in the order of the nodes; empty when every layer becomes an INT8 kernel."""
    graph = Graph(model)
    findings: list[Finding] = []
    for node in model.graph.node:
        findings += _operator(node)
        if node.op_type in PAIR:
            findings += [*_zero_point(node, graph), *_scale(node, graph), *_opset(node, graph)]
            findings += [*_type(node, graph), *_inside_lma(node, graph)]
        else:
            findings += _integer_constant(node, graph)
    findings += _branches(graph)
    for layer in _quantized_layers(graph):
        findings += _inputs(layer, graph)
    return findings


def _found(
    node: onnx.NodeProto, rule: str, reason: str, fix: str, effect: Literal["rejected", "slow"] = "rejected"
) -> Iterator[Finding]:
    yield Finding(node.name or node.output[0], rule, effect, reason, fix)


def _operator(node: onnx.NodeProto) -> Iterator[Finding]:
    if node.op_type in _INTEGER_OPERATORS or (node.op_type.startswith("QLinear") or node.op_type == "QGemm"):
        yield from _found(node, "operator", f"{node.op_type} is not supported", "quantize in Q/DQ format")
    elif node.op_type in PAIR and node.domain not in STANDARD_DOMAINS:
        yield from _found(
            node, "operator", f"{node.op_type} is of the domain {node.domain}", "use the standard operator"
        )


def _zero_point(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    # Without one, QuantizeLinear makes UINT8 and DequantizeLinear takes what it is given.
    default = np.zeros((), np.uint8 if node.op_type == "QuantizeLinear" else np.int8)
    zero_point = graph.constants.get(node.input[2]) if len(node.input) > 2 else default
    if zero_point is None:
        yield from _found(node, "constant", "its zero point is not constant", "quantize statically")
        return
    if zero_point.dtype == np.uint8:
        yield from _found(node, "uint8", "its codes are UINT8", "use symmetric INT8")
    if np.any(zero_point):
        largest = zero_point.ravel()[np.abs(zero_point.astype(np.int64)).argmax()]
        yield from _found(node, "zero point", f"its zero point is {largest}", "use symmetric ranges: zero point 0")


def _scale(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    scale = graph.constants.get(node.input[1])
    if scale is None:
        yield from _found(node, "constant", "its scale is not constant", "quantize statically")
        return
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield from _found(node, "scale", f"its scale is {scale.min():g}", "calibrate on images that reach this layer")
    of_activation = node.op_type == "QuantizeLinear" and node.input[0] not in graph.constants
    if of_activation and scale.size > 1:
        reason = f"an activation has {scale.size} scales, one per channel: its layer runs in float"
        yield from _found(node, "per channel", reason, "quantize activations per tensor", "slow")


def _opset(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    opset = next((entry.version for entry in graph.model.opset_import if entry.domain in STANDARD_DOMAINS), 0)
    scale = graph.constants.get(node.input[1])
    if opset < PER_CHANNEL_OPSET and scale is not None and scale.size > 1:
        reason = f"it has scales per channel, and the model is of opset {opset}"
        yield from _found(node, "opset", reason, f"export with opset {PER_CHANNEL_OPSET} or later")


def _type(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    codes = graph.constants.get(node.input[0])
    if node.op_type == "DequantizeLinear" and codes is not None and codes.dtype == np.int32:
        yield from _found(node, "type", "it dequantizes INT32, as a bias", "keep biases in float")


def _integer_constant(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    for name in node.input:
        value = graph.constants.get(name)
        if value is not None and value.dtype in (np.int8, np.uint8):
            yield from _found(node, "constant", f"it reads the INT8 constant {name}", "dequantize the constant first")


def _inside_lma(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    if node.op_type != "QuantizeLinear":
        return
    made_by = graph.makers.get(node.input[0])
    layer = lma_name(made_by) if made_by is not None else ""
    readers = [reader for user in graph.users[node.output[0]] for reader in graph.users[user.output[0]]]
    if layer and any(lma_name(reader) == layer for reader in readers):
        reason = f"it stands inside the activation {layer}"
        yield from _found(node, "inside LMA", reason, "leave the activation whole in float, between DQ and Q", "slow")


def _branches(graph: Graph) -> Iterator[Finding]:
    for residual in graph.residuals:
        branch, skip = (_behind_pair(name, graph) for name in (residual.branch, residual.skip))
        layer = graph.makers.get(branch)
        if branch != residual.branch and skip != residual.skip and layer is not None and layer.op_type in _WEIGHTED:
            reason = f"both of its inputs are rounded, also the branch, from {layer.name or branch}"
            yield from _found(residual.node, "branch", reason, "round the skip input alone", "slow")


def layers_with_weights(graph: Graph) -> Iterator[onnx.NodeProto]:
    """Convolutions and products with constant weights, in float or rounded; but for those that spell out an LMA."""
    for node in graph.model.graph.node:
        if node.op_type in _WEIGHTED and not lma_name(node) and _weight(node, graph) in graph.constants:
            yield node


def layer_name(node: onnx.NodeProto, graph: Graph) -> str:
    """The torch module's name of a layer, where its weight is called after it."""
    return _weight(node, graph).removesuffix(HALF).removesuffix(".weight")


def _weight(node: onnx.NodeProto, graph: Graph) -> str:
    """The constant that a layer's weights are, before any rounding."""
    name = str(node.input[1])
    while (maker := graph.makers.get(name)) is not None and maker.op_type in PAIR:
        name = str(maker.input[0])
    return name


def _quantized_layers(graph: Graph) -> Iterator[Layer]:
    """Layers whose weights come out of a pair, or out of the DQ of stored codes."""
    for node in layers_with_weights(graph):
        maker = graph.makers.get(node.input[1])
        if maker is not None and maker.op_type == "DequantizeLinear":
            yield Layer(node.name or node.output[0], node, np.zeros((1, 1), np.float32), 0)


def _inputs(layer: Layer, graph: Graph) -> Iterator[Finding]:
    maker = graph.makers.get(layer.input)
    if maker is None or maker.op_type != "DequantizeLinear":
        reason = f"its weights are rounded and its input {layer.input} is not: it runs in float"
        yield from _found(layer.node, "input", reason, "round the input too", "slow")
        return
    weight = graph.makers[layer.node.input[1]]
    scale = graph.constants.get(weight.input[1])
    axis = attributes(weight).get("axis", 1)
    if scale is not None and scale.size > 1 and axis != _channel_axis(layer.node):
        reason = f"its weights have scales along axis {axis}, which is not that of the output channels"
        yield from _found(layer.node, "axis", reason, "scale weights per output channel", "slow")


def _channel_axis(node: onnx.NodeProto) -> int:
    if node.op_type == "Gemm":
        return 0 if attributes(node).get("transB", 0) else 1
    return 0 if node.op_type == "Conv" else 1


def _behind_pair(name: str, graph: Graph) -> str:
    """The tensor whose rounded values `name` holds; `name` itself when they are not rounded."""
    dequantizer = graph.makers.get(name)
    if dequantizer is None or dequantizer.op_type != "DequantizeLinear":
        return name
    quantizer = graph.makers.get(dequantizer.input[0])
    return str(quantizer.input[0]) if quantizer is not None else name
