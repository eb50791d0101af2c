"""Where Q/DQ pairs stand: the one placement that TensorRT turns into INT8 kernels, and how it is written into a graph.

A pair (QuantizeLinear, DequantizeLinear) stands
- on both inputs of a layer (Conv, Gemm, MatMul with constant weights), weights per output channel;
- on the output of a layer, behind the ReLU or Clip that fuses with it, except before the addition that it feeds and
  where it is an output of the graph;
- on the skip input of a residual addition, not on its branch;
- on the input of an LMA, and nowhere inside: it is one function, computed in float between DQ and Q;
- on both sides of what only moves values (MaxPool, Reshape, ...), with one scale.
A tensor has one pair, whoever reads it.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgekd.quantize.calibration import LARGEST
from edgekd.quantize.graph import Graph, Layer, copied, lma_name

QUANTIZED, DEQUANTIZED = "_quantized", "_dequantized"
ZERO_POINT = "zero_point_int8"
# Metadata of a quantized model: the scales of the branches of residual additions, on which it has no pairs.
BRANCH_SCALES = "edgekd.branch_scales"
Reader = tuple[int, int]  # position of the node, position of the input
FUSED = ("Relu", "Clip")


def pairs(graph: Graph, keep_float: Collection[str] = ()) -> dict[str, set[Reader]]:
    """Who reads the rounded values of which tensor. keep_float: names of layers and LMA layers left as they are."""
    position = {id(node): index for index, node in enumerate(graph.model.graph.node)}
    found: dict[str, set[Reader]] = collections.defaultdict(set)

    def read(tensor: str, node: onnx.NodeProto) -> None:
        found[tensor].update((position[id(node)], at) for at, name in enumerate(node.input) if name == tensor)

    kept = [layer for layer in graph.layers if layer.name in keep_float]
    if len(kept) == len(graph.layers):
        return {}
    kept_outputs, kept_nodes = {layer.output for layer in kept}, {id(layer.node) for layer in kept}
    # An addition belongs to the layer of its branch.
    kept_outputs |= {residual.node.output[0] for residual in graph.residuals if residual.branch in kept_outputs}
    for layer in graph.layers:
        if layer.name in keep_float:
            continue
        read(layer.input, layer.node)
        if mover := graph.first_mover(layer.input):
            read(mover.input[0], mover)
        made = _fused_output(graph, layer)
        for user in _rounded_users(graph, made):
            if id(user) not in kept_nodes:
                read(made, user)
    for region in graph.lma:
        if region.name not in keep_float and region.input not in kept_outputs:
            for node in region.nodes:
                read(region.input, node)
    for residual in graph.residuals:
        if residual.branch not in kept_outputs:
            read(residual.skip, residual.node)
            if mover := graph.first_mover(residual.skip):
                read(mover.input[0], mover)
    return {tensor: readers for tensor, readers in found.items() if readers}


def quantized(graph: Graph, scales: Mapping[str, np.float32], keep_float: Collection[str] = ()) -> onnx.ModelProto:
    """The model with its pairs: int8, zero point 0, weights per output channel, biases in float.

    scales: of every tensor that `sources` names.
    """
    readers = pairs(graph, keep_float)
    layers = {layer.output: layer for layer in graph.layers if layer.name not in keep_float}
    model = copied(graph.model)
    nodes = list(model.graph.node)
    for tensor, places in readers.items():
        for node, at in places:
            nodes[node].input[at] = tensor + DEQUANTIZED
    ordered: list[onnx.NodeProto] = []
    written: set[str] = set()

    def write(tensor: str, scale: npt.NDArray[np.float32], axis: int | None) -> None:
        model.graph.initializer.append(numpy_helper.from_array(scale, f"{tensor}_scale"))
        zero_point = ZERO_POINT
        if axis is not None:
            zero_point = f"{tensor}_zero_point"
            model.graph.initializer.append(numpy_helper.from_array(np.zeros(len(scale), np.int8), zero_point))
        ordered.extend(pair(tensor, f"{tensor}_scale", zero_point, axis))
        written.add(tensor)

    def write_activation(tensor: str) -> None:
        if tensor in readers:
            write(tensor, np.asarray(scales[graph.source(tensor)], np.float32), None)

    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), ZERO_POINT))
    write_activation(graph.image.name)
    for node in nodes:
        layer = layers.get(node.output[0])
        if layer is not None:
            weight = node.input[1]
            if weight not in written:
                write(weight, weight_scales(layer), layer.channel_axis)
            node.input[1] = weight + DEQUANTIZED
        ordered.append(node)
        for name in node.output:
            write_activation(name)
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    branches = {name: float(scales[name]) for name in _branches(graph) if name in layers}
    model.metadata_props.add(key=BRANCH_SCALES, value=json.dumps(branches))
    return model


def float_from_int8(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, float]]:
    """The model without its pairs, and the scales of the activations that they rounded, by tensor."""
    model = copied(model)
    constants = Graph(model).constants
    quantizers = {node.output[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}
    origin = {
        node.output[0]: quantizers[node.input[0]].input[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantizers
    }
    scales = {
        node.input[0]: float(constants[node.input[1]]) for node in quantizers.values() if node.input[0] not in constants
    }
    kept = [node for node in model.graph.node if node.output[0] not in {*quantizers, *origin}]
    for node in kept:
        node.input[:] = [origin.get(name, name) for name in node.input]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model, scales


def sources(graph: Graph) -> list[str]:
    """The tensors whose range decides a scale, when nothing is kept in float."""
    return list(dict.fromkeys([*(graph.source(tensor) for tensor in pairs(graph)), *_branches(graph)]))


def roles(graph: Graph) -> dict[tuple[str, ...], str]:
    """The tensors of `sources` by what they are to the layers: alike in all graphs of one network, unlike names."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for index, layer in enumerate(graph.layers):
        found[graph.source(layer.input)].append(f"input of layer {index}")
        found[_fused_output(graph, layer)].append(f"output of layer {index}")
    for index, region in enumerate(graph.lma):
        found[graph.source(region.input)].append(f"input of LMA {index}")
    for index, residual in enumerate(graph.residuals):
        found[residual.branch].append(f"branch of addition {index}")
        found[graph.source(residual.skip)].append(f"skip of addition {index}")
    return {tuple(sorted(found[tensor])): tensor for tensor in sources(graph)}


def pair(tensor: str, scale: str, zero_point: str, axis: int | None = None) -> Iterator[onnx.NodeProto]:
    """The two nodes that round `tensor` to `tensor_dequantized`."""
    per_channel: dict[str, Any] = {} if axis is None else {"axis": axis}
    for operator, read, made in (
        ("QuantizeLinear", tensor, tensor + QUANTIZED),
        ("DequantizeLinear", tensor + QUANTIZED, tensor + DEQUANTIZED),
    ):
        yield helper.make_node(operator, [read, scale, zero_point], [made], f"{tensor}_{operator}", **per_channel)


def _branches(graph: Graph) -> list[str]:
    outputs = {layer.output for layer in graph.layers}
    return [residual.branch for residual in graph.residuals if residual.branch in outputs]


def weight_scales(layer: Layer) -> npt.NDArray[np.float32]:
    """The scale of each output channel of the weights; a channel of zeros gets 1."""
    others = tuple(axis for axis in range(layer.weight.ndim) if axis != layer.channel_axis)
    largest = np.abs(layer.weight).max(axis=others)
    return np.where(largest > 0, largest / np.float32(LARGEST), 1).astype(np.float32)


def _fused_output(graph: Graph, layer: Layer) -> str:
    """What a layer makes together with the ReLU or Clip that fuses with it."""
    users = graph.users[layer.output]
    fused = len(users) == 1 and users[0].op_type in FUSED and not lma_name(users[0])
    return str(users[0].output[0]) if fused else layer.output


def _rounded_users(graph: Graph, tensor: str) -> Iterator[onnx.NodeProto]:
    """Who reads what a layer made, but for residual additions and LMA layers, which have rules of their own."""
    additions = {id(residual.node) for residual in graph.residuals}
    inside = {id(node) for region in graph.lma if region.input == tensor for node in region.nodes}
    yield from (user for user in graph.users[tensor] if id(user) not in additions | inside)
