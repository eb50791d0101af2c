"""One calibration, several dialects: the same scales as each runtime wants them written.

`placement.quantized` writes for TensorRT, TVM and anything that follows ONNX: int8 activations with zero point 0. ONNX
Runtime computes a layer in integers only where a pair stands right behind it, and only with uint8 activations fast on
x86. `onnxruntime_from_int8` rewrites for it; each step says whether it changes a number.
"""

from __future__ import annotations

import json
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgekd.quantize.graph import Graph, attributes, copied
from edgekd.quantize.packing import float_from_packed
from edgekd.quantize.placement import BRANCH_SCALES, DEQUANTIZED, FUSED, QUANTIZED, ZERO_POINT, pair

Dialect = Literal["int8", "onnxruntime_uint8", "onnxruntime_int8"]
ZERO_POINT_UINT8 = "zero_point_uint8"
_MIDDLE = 128
_INT32_END = 2.0**31


def translated(model: onnx.ModelProto, dialect: Dialect) -> onnx.ModelProto:
    """A quantized model as a backend wants it written. Packed weights stay packed for ONNX Runtime alone."""
    if dialect == "int8":
        return float_from_packed(model)
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return model
    return onnxruntime_from_int8(model, activations="uint8" if dialect == "onnxruntime_uint8" else "int8")


def onnxruntime_from_int8(
    model: onnx.ModelProto, *, activations: Literal["uint8", "int8"] = "uint8"
) -> onnx.ModelProto:
    """For ONNX Runtime: uint8 activations on x86, int8 on ARM.

    Next to the int8 dialect, branches of residual additions are rounded, and biases are rounded to 32 bits.
    """
    model = with_integer_biases(with_integer_relu(with_rounded_branches(model)))
    return with_stored_weights(uint8_from_int8(model) if activations == "uint8" else model)


def uint8_from_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """Activations as uint8 with the same scale and zero point 128: code + 128, the same numbers exactly."""
    model = copied(model)
    model.graph.initializer.append(numpy_helper.from_array(np.array(_MIDDLE, np.uint8), ZERO_POINT_UINT8))
    nodes = list(model.graph.node)
    constants = {tensor.name for tensor in model.graph.initializer}
    rounded = set()
    for node in nodes:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            node.input[2] = ZERO_POINT_UINT8
            rounded.add(node.output[0])
    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in rounded:
            node.input[2] = ZERO_POINT_UINT8
    return _with_nodes(model, nodes)


def with_rounded_branches(model: onnx.ModelProto) -> onnx.ModelProto:
    """Round the branch of each residual addition too: one more rounding, without which its layer runs in float."""
    model = copied(model)
    graph = Graph(model)
    stored = json.loads(next((entry.value for entry in model.metadata_props if entry.key == BRANCH_SCALES), "{}"))
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        tensor = node.output[0]
        if tensor not in stored:
            continue
        for user in graph.users[tensor]:
            if user.op_type == "Add":
                user.input[:] = [name + DEQUANTIZED if name == tensor else name for name in user.input]
        if tensor + QUANTIZED not in graph.makers:
            scale = numpy_helper.from_array(np.array(stored[tensor], np.float32), f"{tensor}_scale")
            model.graph.initializer.append(scale)
            nodes.extend(pair(tensor, scale.name, ZERO_POINT))
    return _with_nodes(model, nodes)


def rounds_branches(model: onnx.ModelProto) -> bool:
    """Whether `with_rounded_branches` changes what an int8 model computes."""
    stored = next((entry.value for entry in model.metadata_props if entry.key == BRANCH_SCALES), "{}")
    return bool(json.loads(stored))


def with_integer_relu(model: onnx.ModelProto) -> onnx.ModelProto:
    """ReLU and Clip behind the rounding: the same numbers, and the layer in front of them ends in a pair.

    Rounding is monotone and 0 is a code, so it does not matter which comes first; the upper end of a Clip is at or
    above the largest code, for the range was measured behind it. A LeakyRelu with alpha 0 is the spelling of ReLU that
    ONNX Runtime computes on the codes.
    """
    model = copied(model)
    graph = Graph(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        quantizers = [user for user in graph.users[node.output[0]] if user.op_type == "QuantizeLinear"]
        clips_at = _upper_end(node, graph)
        if clips_at is None or not quantizers or len(graph.users[node.input[0]]) > 1:
            nodes.append(node)
            continue
        _, scale, zero_point = quantizers[0].input
        if clips_at < 127 * float(graph.constants[scale]) * (1 - 1e-6):
            nodes.append(node)
            continue
        nodes.extend(pair(node.input[0], scale, zero_point))
        made = node.output[0]
        nodes.append(helper.make_node("LeakyRelu", [node.input[0] + DEQUANTIZED], [made], node.name, alpha=0.0))
    return _with_nodes(model, nodes)


def with_integer_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """Biases as INT32 in units of input scale x weight scale, as integer kernels add them.

    ONNX Runtime does it for a Conv by itself, from 1.21 on; without, a Gemm runs in float. TensorRT takes no INT32.
    """
    model = copied(model)
    graph = Graph(model)
    nodes = []
    for node in model.graph.node:
        scale = _product_scale(node, graph)
        bias = graph.constants.get(node.input[2]) if scale is not None and len(node.input) > 2 else None
        if (
            scale is not None
            and bias is not None
            and bias.ndim == 1
            and np.abs(codes := np.rint(bias / scale)).max() < _INT32_END
        ):
            made = f"{node.output[0]}_bias"
            for suffix, values in ((QUANTIZED, codes.astype(np.int32)), ("_scale", scale.astype(np.float32))):
                model.graph.initializer.append(numpy_helper.from_array(values, made + suffix))
            inputs, outputs = [made + QUANTIZED, f"{made}_scale"], [made + DEQUANTIZED]
            nodes.append(helper.make_node("DequantizeLinear", inputs, outputs, f"{made}_DequantizeLinear", axis=0))
            node.input[2] = made + DEQUANTIZED
        nodes.append(node)
    return _with_nodes(model, nodes)


def with_stored_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights as int8 in the file, without their QuantizeLinear: the same numbers in a quarter of the bytes."""
    model = copied(model)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] not in constants:
            nodes.append(node)
            continue
        weight, scale = constants[node.input[0]], constants[node.input[1]]
        axis = attributes(node).get("axis", 1)
        shape = [-1 if at == axis else 1 for at in range(weight.ndim)]
        codes = np.clip(np.rint(weight / scale.reshape(shape)), -128, 127).astype(np.int8)
        model.graph.initializer.append(numpy_helper.from_array(codes, node.output[0]))
    return _with_nodes(model, nodes)


def _product_scale(node: onnx.NodeProto, graph: Graph) -> npt.NDArray[np.float64] | None:
    """Input scale x weight scales of a quantized layer, [output channels]; None for any other node."""
    if node.op_type not in ("Conv", "Gemm"):
        return None
    makers = [graph.makers.get(name) for name in node.input[:2]]
    scales = [graph.constants[maker.input[1]] for maker in makers if maker and maker.op_type == "DequantizeLinear"]
    return scales[0].astype(np.float64) * scales[1] if len(scales) == 2 else None


def _upper_end(node: onnx.NodeProto, graph: Graph) -> float | None:
    """Where a node that is a ReLU, or a Clip from 0, ends; None for any other node."""
    if node.op_type not in FUSED:
        return None
    if node.op_type == "Relu":
        return np.inf
    low, high = (
        graph.constants.get(node.input[at]) if len(node.input) > at and node.input[at] else default
        for at, default in ((1, np.array(-np.inf)), (2, np.array(np.inf)))
    )
    return None if low is None or high is None or low.item() != 0 else float(high.item())


def _with_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    """The model with other nodes, without the constants that none of them reads."""
    nodes = [copied(node) for node in nodes]  # they may live in the list that is emptied
    read = {name for node in nodes for name in node.input} | {value.name for value in model.graph.output}
    constants = [copied(tensor) for tensor in model.graph.initializer if tensor.name in read]
    for field, values in (("node", nodes), ("initializer", constants)):
        del getattr(model.graph, field)[:]
        getattr(model.graph, field).extend(values)
    return model
