"""LMA layers seen from the middle of their cuts: the bias of the layer before moves the origin there, at no cost."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from edgekd.backends.tvm.segments import Segments

Array = npt.NDArray[Any]

ADD_BIAS, BIAS = ("BatchNormalization", "Conv", "Gemm"), 2  # operators, and which input of theirs is added


def move_origins(graph: onnx.GraphProto, lanes: int) -> None:
    """Where only the LMA layer reads a biased sum, change the bias and the segments, in place; lanes: of a register."""
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for node in makers.values():
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    readers = collections.Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    for layer in [node for node in graph.node if node.op_type == "LMA"]:
        maker, numbers = makers.get(layer.input[0]), [constants.get(name) for name in layer.input[1:4]]
        if maker is None or maker.op_type not in ADD_BIAS or readers[layer.input[0]] > 1:
            continue
        if any(attribute.name == "beta" and attribute.f != 1 for attribute in maker.attribute):
            continue
        bias = constants.get(maker.input[BIAS]) if len(maker.input) > BIAS else None
        if bias is None or any(one is None for one in numbers):
            continue
        segments = Segments(*(np.asarray(one, np.float32).reshape(-1) for one in numbers))
        if "index" not in segments.forms(lanes):
            continue
        origin = float(np.float32(segments.middle))
        _replace(graph, maker, BIAS, (bias - np.float64(origin)).astype(bias.dtype))
        for at, array in enumerate(segments.shifted(origin), start=1):
            _replace(graph, layer, at, array)


def _replace(graph: onnx.GraphProto, node: onnx.NodeProto, at: int, array: Array) -> None:
    """Give a node a constant of its own: others may read the one that it had."""
    node.input[at] = f"{node.output[0]}.moved.{at}"
    graph.initializer.append(numpy_helper.from_array(array, node.input[at]))
