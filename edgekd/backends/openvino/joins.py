"""Concat of values that are codes: OpenVINO joins the codes themselves, and gets them wrong by a third of the answer.

Seen in 2026.4 with every int8 Concat, also of equal scales and of parts that are not rounded themselves: its passes for
low precision pull the rounding behind the Concat in front of it. A maximum in between that changes no value keeps them
apart, and the layers around it stay in integers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgekd.quantize.graph import Graph, copied

LOWEST = float(np.finfo(np.float32).min)


def kept_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same numbers, with a maximum behind every Concat that codes go into or come out of."""
    graph, model = Graph(model), copied(model)
    nodes: list[onnx.NodeProto] = []
    lowest = dict(_joins(graph))
    for node in model.graph.node:
        node = copied(node)
        node.input[:] = [f"{name}_apart" if name in lowest else name for name in node.input]
        nodes.append(node)
        for name in node.output:
            if name in lowest:
                bound = numpy_helper.from_array(np.array(lowest[name], np.float32), f"{name}_lowest")
                model.graph.initializer.append(bound)
                nodes.append(helper.make_node("Max", [name, bound.name], [f"{name}_apart"], f"{name}_Max"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _joins(graph: Graph) -> Iterator[tuple[str, float]]:
    """What each such Concat makes, and the smallest value of which its rounding knows, if it is only rounded."""
    for node in graph.model.graph.node:
        made = node.output[0]
        if node.op_type != "Concat" or made in graph.outputs:
            continue
        rounded = [user for user in graph.users[made] if user.op_type == "QuantizeLinear"]
        makers = [graph.makers.get(name) for name in node.input]
        if rounded:
            only = len(rounded) == len(graph.users[made])  # who reads it as it is needs what is below the codes too
            yield made, min(_smallest(user, graph) for user in rounded) if only else LOWEST
        elif any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers):
            yield made, LOWEST


def _smallest(quantizer: onnx.NodeProto, graph: Graph) -> float:
    """Of integers that its inputs name; other kinds of codes are as good as unlimited."""
    scale, zero = graph.constants.get(quantizer.input[1]), None
    if len(quantizer.input) > 2:
        zero = graph.constants.get(quantizer.input[2])
    elif not any(attribute.name == "output_dtype" for attribute in quantizer.attribute):
        zero = np.zeros((), np.uint8)
    if scale is None or zero is None or zero.dtype.kind not in "iu" or scale.size > 1:
        return LOWEST
    return float((np.iinfo(zero.dtype).min - int(zero.item())) * scale.item())
