"""LMA behind 8-bit codes as a table: its input has 256 values, so its output has.

Between a DequantizeLinear and a QuantizeLinear an LMA layer maps codes to codes. The table is made by running the very
nodes that it replaces, on all codes, in ONNX Runtime: so it is exactly equal to the float form followed by rounding,
whatever the form and wherever the cuts lie. Whether it is faster depends on the runtime, which has to measure it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.marks import LMA_MARK
from edgekd.quantize import sessions
from edgekd.quantize.graph import Graph, Segmented, copied

Array = npt.NDArray[Any]
# gather: a float table for TensorRT, which takes no 8-bit constants there. elements: for ONNX Runtime, whose Gather
# copies element by element (7.8 ns each) where GatherElements takes 1.0 ns; the table holds codes where it can.
Style = Literal["gather", "elements"]
CODES = 256
_SUFFIX = "_table"


def with_tables(model: onnx.ModelProto, style: Style) -> onnx.ModelProto:
    """A quantized model (int8 or uint8 codes) with each LMA layer that reads codes as a table.

    Where all that follows is one QuantizeLinear, the style `elements` takes it into the table. A layer whose input is
    in float stays as it is; so does one whose shape cannot be inferred.
    """
    model = copied(model)
    graph = Graph(model)
    regions = [region for region in graph.lma if _reads_codes(graph, region)]
    shapes = _shapes(model) if regions else {}
    nodes = list(model.graph.node)
    for region in regions:
        if region.input not in shapes:
            continue
        users = graph.users[region.output]
        ends_in_codes = (
            style == "elements"
            and [user.op_type for user in users] == ["QuantizeLinear"]
            and region.output not in graph.outputs
        )
        made = users[0] if ends_in_codes else region.nodes[-1]
        output = made.output[0] if ends_in_codes else region.output
        table = numpy_helper.from_array(_table(graph, region, output, shapes[region.input]), output + _SUFFIX)
        model.graph.initializer.append(table)
        at = nodes.index(made)
        nodes[at : at + 1] = list(_look_up(graph, region, output, style))
    _keep_needed(model, nodes)
    return model


def tables(model: onnx.ModelProto) -> list[str]:
    """The LMA layers of a model that are tables."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [region.name for region in Graph(model).lma if _is_table(region, constants)]


def _is_table(region: Segmented, constants: set[str]) -> bool:
    return any(name.endswith(_SUFFIX) and name in constants for node in region.nodes for name in node.input)


def _reads_codes(graph: Graph, region: Segmented) -> bool:
    reader = graph.makers.get(region.input)
    return reader is not None and reader.op_type == "DequantizeLinear"


def _look_up(graph: Graph, region: Segmented, output: str, style: Style) -> Iterator[onnx.NodeProto]:
    """The nodes from codes to `output`, which carry the layer's mark."""
    codes = graph.makers[region.input].input[0]
    table, index = output + _SUFFIX, f"{region.input}_index"
    chain: list[tuple[str, list[str], str, dict[str, Any]]] = [("Cast", [codes], index, {"to": TensorProto.INT32})]
    if _zero_point(graph, region).dtype == np.int8:
        chain.append(
            ("Constant", [], f"{index}_offset", {"value": numpy_helper.from_array(np.array(CODES // 2, np.int32))})
        )
        chain.append(("Add", [index, f"{index}_offset"], f"{index}_shifted", {}))
        index += "_shifted"
    if style == "gather":
        chain.append(("Gather", [table, index], output, {}))
    else:
        row = f"{output}_row"
        chain += [
            ("Constant", [], row, {"value_ints": [-1]}),
            ("Reshape", [index, row], f"{index}_flat", {}),
            ("GatherElements", [table, f"{index}_flat"], f"{output}_flat", {}),
            ("Shape", [codes], f"{output}_shape", {}),
            ("Reshape", [f"{output}_flat", f"{output}_shape"], output, {}),
        ]
    for operator, inputs, made, options in chain:
        node = helper.make_node(operator, inputs, [made], f"{made}_{operator}", **options)
        node.metadata_props.add(key=LMA_MARK, value=region.name)
        yield node


def _table(graph: Graph, region: Segmented, output: str, shape: tuple[int, ...]) -> Array:
    """What the graph makes of each code, from the smallest on: [256], in the type of `output`."""
    zero_point = _zero_point(graph, region)
    reader = graph.makers[region.input]
    smallest = np.iinfo(zero_point.dtype).min
    codes = np.arange(smallest, smallest + CODES).astype(np.float32) - zero_point
    values = (codes * graph.constants[reader.input[1]]).astype(np.float32)
    session = sessions.opened(_alone(graph, region.input, output, shape))
    size = int(np.prod(shape))  # the nodes may take this shape only, and their results may depend on it in the last bit
    found = []
    for at in range(0, CODES, size):
        some = values[at : at + size]
        found.append(session.run([output], {region.input: np.resize(some, shape)})[0].reshape(-1)[: len(some)])
    return np.concatenate(found)


def _alone(graph: Graph, start: str, end: str, shape: tuple[int, ...]) -> onnx.ModelProto:
    """The part of the model that makes `end` of `start`."""
    needed, todo, nodes = {start}, [end], []
    while todo:
        name = todo.pop()
        if name not in needed and name in graph.makers:
            nodes.append(graph.makers[name])
            todo.extend(graph.makers[name].input)
        needed.add(name)
    order = {id(node): index for index, node in enumerate(graph.model.graph.node)}
    nodes = sorted({id(node): node for node in nodes}.values(), key=lambda node: order[id(node)])
    alone = copied(graph.model)
    constants = [copied(tensor) for tensor in alone.graph.initializer if tensor.name in needed]
    alone.graph.CopyFrom(
        helper.make_graph(
            nodes,
            "table",
            [helper.make_tensor_value_info(start, TensorProto.FLOAT, shape)],
            [onnx.ValueInfoProto(name=end)],
            constants,
        )
    )
    return alone


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of known rank; what is open is as large as the table's codes together need."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    found = {}
    for value in (*inferred.value_info, *inferred.input):
        if value.type.tensor_type.HasField("shape"):
            sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
            known = int(np.prod([size for size in sizes if size]))
            found[value.name] = tuple(size or -(-CODES // known) for size in sizes)
    return found


def _zero_point(graph: Graph, region: Segmented) -> Array:
    reader = graph.makers[region.input]
    return graph.constants[reader.input[2]] if len(reader.input) > 2 else np.zeros((), np.uint8)


def _keep_needed(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Give the model these nodes, without those that lead to no output."""
    needed = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(copied(node))
    constants = [copied(tensor) for tensor in model.graph.initializer if tensor.name in needed]
    for field, values in ((model.graph.node, reversed(kept)), (model.graph.initializer, constants)):
        values = list(values)
        del field[:]
        field.extend(values)
