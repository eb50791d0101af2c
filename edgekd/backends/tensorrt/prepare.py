"""An ONNX model as a release of TensorRT reads it: no functions, no operators of later releases, no later opset."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import defs, helper, inliner

from edgekd.backends.tensorrt.linter import opset_of
from edgekd.backends.tensorrt.releases import Release, release_of
from edgekd.errors import StageError
from edgekd.quantize.graph import STANDARD_DOMAINS, Graph, copied


def prepared(model: onnx.ModelProto, version: str) -> onnx.ModelProto:
    """A model that computes the same in what TensorRT `version` reads.

    Model-local functions are written out, operators that the release lacks become what ONNX defines them as, and the
    opset goes down to the release's. Raises StageError when an older opset cannot say what a node does.
    """
    release = release_of(version)
    model = _decomposed(inliner.inline_local_functions(model) if model.functions else copied(model), release)
    if foreign := sorted({node.domain for node in model.graph.node} - {*STANDARD_DOMAINS}):
        raise StageError(
            f"the model has operators of the domain {', '.join(foreign)}, for which TensorRT has no plugin",
            allowed="allowed: the standard operators of ONNX, and functions of them that the model itself defines",
            fix="export the network with the standard operators only",
        )
    if opset_of(model) > release.opset:
        model = _lowered(model, release.opset)
    onnx.checker.check_model(model, full_check=True)
    return model


def _decomposed(model: onnx.ModelProto, release: Release) -> onnx.ModelProto:
    """ONNX itself defines its larger operators as functions of smaller ones, some of which are functions again."""
    opset = opset_of(model)
    while True:
        later = {node.op_type for node in model.graph.node if node.domain in STANDARD_DOMAINS} - release.operators
        defined = sorted(name for name in later if defs.has(name) and _is_function(defs.get_schema(name, opset)))
        if not defined:
            return model
        ids = [("", name) for name in defined]
        model = inliner.inline_selected_functions(_with_types(model), ids, inline_schema_functions=True)


def _with_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """With the type of every tensor, constants too: a function's body depends on them."""
    model = onnx.shape_inference.infer_shapes(model)
    known = {value.name for value in model.graph.value_info}
    model.graph.value_info.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in model.graph.initializer
        if tensor.name not in known
    )
    return model


def _is_function(schema: Any) -> bool:
    return bool(schema.has_function or schema.has_context_dependent_function)


def _lowered(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The same nodes under an older opset: what this one does not know of a node must say nothing."""
    graph, newer = Graph(model), opset_of(model)
    for node in model.graph.node:
        before, after = (_schema(node.op_type, version) for version in (newer, opset))
        if after is None or before is None:
            raise _cannot(node, opset, f"there is no {node.op_type}")
        if before.since_version != after.since_version:
            _lower_inputs(node, after, graph, opset)
            _lower_attributes(node, before, after, graph, opset)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", opset))
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    return model


def _schema(operator: str, opset: int) -> defs.OpSchema | None:
    return defs.get_schema(operator, opset) if defs.has(operator, max_inclusive_version=opset) else None


def _lower_attributes(
    node: onnx.NodeProto, before: defs.OpSchema, after: defs.OpSchema, graph: Graph, opset: int
) -> None:
    for attribute in [one for one in node.attribute if one.name not in after.attributes]:
        default = before.attributes[attribute.name].default_value
        says_nothing = default.type and helper.get_attribute_value(attribute) == helper.get_attribute_value(default)
        if not says_nothing and not (attribute.name == "allowzero" and _has_no_zero(node.input[1], graph)):
            raise _cannot(node, opset, f"it has no {attribute.name}")
        node.attribute.remove(attribute)


def _has_no_zero(shape: str, graph: Graph) -> bool:
    return shape in graph.constants and bool(np.all(graph.constants[shape]))


def _lower_inputs(node: onnx.NodeProto, after: defs.OpSchema, graph: Graph, opset: int) -> None:
    while len(node.input) > after.max_input:
        name, at = node.input[-1], len(node.input) - 1
        if name:
            attribute = _AS_ATTRIBUTE.get(node.op_type)
            if attribute is None or name not in graph.constants or attribute not in after.attributes:
                raise _cannot(node, opset, f"it has no input {at}")
            node.attribute.append(
                helper.make_attribute(attribute, [int(axis) for axis in np.ravel(graph.constants[name])])
            )
        node.input.pop()


# Operators whose last input was an attribute before.
_AS_ATTRIBUTE = {
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"), "axes"),
}


def _cannot(node: onnx.NodeProto, opset: int, why: str) -> StageError:
    return StageError(
        f"{node.op_type} {node.name or node.output[0]} cannot be written for opset {opset}: {why}",
        allowed="the TensorRT of this target reads no later one",
        fix="replace the operator in the network's forward, or use a board with a later TensorRT",
    )
