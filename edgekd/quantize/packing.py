"""Weights in ONNX as the few bits that they have, unpacked by standard operators when a runtime loads the model.

A packed weight is one call of the model-local function `edgekd.Unpack4` or `edgekd.Unpack8`, all of whose inputs are
constants. ONNX Runtime inlines the call and folds it into one float constant before it runs anything, so the model is
small on disk and as fast as the float one. A runtime that cannot do this takes `float_from_packed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
from onnx import TensorProto, helper, numpy_helper

from edgekd.quantize.graph import LMA_DOMAIN as DOMAIN
from edgekd.quantize.graph import STANDARD_DOMAINS, Graph, Layer, copied

Array = npt.NDArray[Any]
# A weight that is restored from its codes may differ from the exported one by rounding, as a share of the largest.
TOLERANCE = 1e-6
# The low halves of a row's bytes are its first codes, the high ones the rest: no axis has to be added or moved.
_CODES = {
    4: """
    sixteen = Constant <value_float = 16.0> ()
    bytes = Cast <to = 1> (packed)
    shifted = Div (bytes, sixteen)
    high = Floor (shifted)
    without_low = Mul (high, sixteen)
    low = Sub (bytes, without_low)
    codes = Concat <axis = 1> (low, high)
    """,
    8: """
    codes = Cast <to = 1> (packed)
    """,
}
_ONNX = """
<domain: "%s", opset_import: ["": %d]>
Unpack%d (packed, step, minimum, factor, shape) => (weight) {
    start = Constant <value_ints = [0]> ()
    row = Constant <value_ints = [-1]> ()
    %s
    steps = Mul (codes, step)
    values = Add (steps, minimum)
    flat = Reshape (values, row)
    count = ReduceProd <keepdims = 1> (shape)
    filled = Slice (flat, start, count)
    shaped = Reshape (filled, shape)
    weight = Mul (shaped, factor)
}
"""


@dataclass(frozen=True)
class Packed:
    """A weight as codes: factor * (minimum + code * step), which fill `shape` row by row.

    codes: uint8 [N, bucket]. step, minimum: float32 [N, 1]. factor: float32, of one value or one for each output
    channel: what batch normalisation, folded into the layer, multiplies it by.
    """

    bits: int
    codes: Array
    step: Array
    minimum: Array
    shape: tuple[int, ...]
    factor: Array

    def weight(self) -> Array:
        """The float32 weight, to the last bit what the function in the graph makes."""
        flat = (self.codes.astype(np.float32) * self.step + self.minimum).reshape(-1)
        weight: Array = flat[: int(np.prod(self.shape))].reshape(self.shape) * self.factor
        return weight

    def constants(self) -> dict[str, Array]:
        """What is stored: the inputs of the function, in its order."""
        half = self.codes.shape[1] // 2
        packed = self.codes if self.bits == 8 else self.codes[:, :half] | self.codes[:, half:] << 4
        return {
            "packed": packed.astype(np.uint8), "step": self.step, "minimum": self.minimum, "factor": self.factor,
            "shape": np.array(self.shape, np.int64),
        }  # fmt: skip


def with_packed(model: onnx.ModelProto, weights: Mapping[str, Packed]) -> onnx.ModelProto:
    """The model with the `weights` of its layers, by name of the constant, stored packed (of factor 1).

    A weight into which a normalisation has been folded gets the factors that make it the exported one. One that the
    exporter has changed in another way stays in float, and so does a vector: its nodes would outweigh it.
    """
    graph, model = Graph(model), copied(model)
    packed = {layer.node.input[1]: fitted(layer, weights.get(layer.node.input[1])) for layer in graph.layers}
    nodes, infos = [], []
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, weight in packed.items():
        if weight is None:
            continue
        inputs = []
        for part, values in weight.constants().items():
            inputs.append(f"{name}_{part}")
            constants[inputs[-1]] = numpy_helper.from_array(values, inputs[-1])
        nodes.append(helper.make_node(f"Unpack{weight.bits}", inputs, [name], f"{name}_unpack", domain=DOMAIN))
        infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, weight.shape))
        del constants[name]
    _replace(model, [*nodes, *model.graph.node], list(constants.values()))
    model.graph.value_info.extend(infos)
    for bits in sorted({weight.bits for weight in packed.values() if weight is not None}):
        _add_function(model, bits)
    return model


def float_from_packed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same numbers to the last bit, as plain float constants: for runtimes that take no uint8 or no functions."""
    graph, model = Graph(model), copied(model)
    weights = dict(_weights(graph))
    nodes = [node for node in model.graph.node if not _is_unpack(node)]
    read = {name for node in nodes for name in node.input} | graph.outputs
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    constants += [numpy_helper.from_array(packed.weight(), name) for name, packed in weights.items()]
    _replace(model, nodes, constants)
    infos = [copied(info) for info in model.graph.value_info if info.name not in weights]
    functions = [copied(function) for function in model.functions if not function.name.startswith("Unpack")]
    for field, values in ((model.graph.value_info, infos), (model.functions, functions)):
        del field[:]
        field.extend(values)
    return model


def fitted(layer: Layer, packed: Packed | None) -> Packed | None:
    """`packed` with the factor of each output channel that makes it the weight of `layer`; None when none does."""
    if packed is None or packed.shape != layer.weight.shape:
        return None
    weight = packed.weight()
    if np.array_equal(weight, layer.weight):
        return packed
    others = tuple(axis for axis in range(weight.ndim) if axis != layer.channel_axis)
    wanted, found = layer.weight.astype(np.float64), weight.astype(np.float64)
    power = np.square(found).sum(axis=others, keepdims=True)
    factor = (wanted * found).sum(axis=others, keepdims=True) / np.where(power > 0, power, 1)
    again = Packed(packed.bits, packed.codes, packed.step, packed.minimum, packed.shape, factor.astype(np.float32))
    close = np.abs(again.weight() - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    return again if close else None


def _weights(graph: Graph) -> Iterator[tuple[str, Packed]]:
    """The packed weights of a model, by name."""
    for node in graph.model.graph.node:
        if _is_unpack(node):
            packed, step, minimum, factor, shape = (graph.constants[name] for name in node.input)
            bits = int(node.op_type.removeprefix("Unpack"))
            codes = packed if bits == 8 else np.concatenate((packed & 15, packed >> 4), axis=1)
            yield node.output[0], Packed(bits, codes, step, minimum, tuple(shape.tolist()), factor)


def _is_unpack(node: onnx.NodeProto) -> bool:
    return bool(node.domain == DOMAIN and node.op_type.startswith("Unpack"))


def _add_function(model: onnx.ModelProto, bits: int) -> None:
    opset = next(entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS)
    model.functions.append(onnx.parser.parse_function(_ONNX % (DOMAIN, opset, bits, _CODES[bits])))
    if all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _replace(model: onnx.ModelProto, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> None:
    for field, values in ((model.graph.node, nodes), (model.graph.initializer, constants)):
        kept = [copied(value) for value in values]  # they may live in the list that is emptied
        del field[:]
        field.extend(kept)
