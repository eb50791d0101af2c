"""What a release of TensorRT would not take of a model, found without TensorRT.

The rules of Q/DQ graphs are those of `edgekd.quantize.rules`; here are those of every graph: operators and opset by
release, shapes, and what the parser says no to by the node.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator

import numpy as np
import onnx

from edgekd.backends.tensorrt.releases import Release, release_of, version_of
from edgekd.quantize.graph import STANDARD_DOMAINS, Graph, attributes
from edgekd.quantize.rules import PAIR, Finding, check

_POOLS = ("MaxPool", "AveragePool")
# Which input says along what axes.
_AXES = {
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"), 1),
    "Squeeze": 1, "Unsqueeze": 1, "Slice": 3, "Pad": 3, "CumSum": 1,
}  # fmt: skip
_MOST_FOUND = 3840  # by TopK
_IN_PARTS = {
    "LayerNormalization": "ReduceMean, Sub, Mul and Sqrt",
    "GroupNormalization": "Reshape and InstanceNormalization",
    "Gelu": "Erf, Mul and Add",
    "Mish": "Softplus, Tanh and Mul",
    "HardSwish": "HardSigmoid and Mul",
}
# The element types that a tensor inside the network may have; UINT8 only at its ends.
_TYPES = {
    onnx.TensorProto.UINT8: "UINT8", onnx.TensorProto.INT16: "INT16", onnx.TensorProto.UINT16: "UINT16",
    onnx.TensorProto.UINT32: "UINT32", onnx.TensorProto.UINT64: "UINT64", onnx.TensorProto.STRING: "STRING",
    onnx.TensorProto.COMPLEX64: "COMPLEX64", onnx.TensorProto.COMPLEX128: "COMPLEX128",
}  # fmt: skip


def lint(model: onnx.ModelProto, version: str) -> list[Finding]:
    """All findings for TensorRT `version` ("8.5", "10.3.0"), those of the whole model first, then by node."""
    release, graph = release_of(version), Graph(model)
    found = [*_opset(model, release, version), *_inputs(graph)]
    for node in model.graph.node:
        found += _operator(node, model, release, version)
        found += _tensor_types(node)
        for rule in _BY_OPERATOR.get(node.op_type, ()):
            if release.version < _UNTIL.get(rule, (sys.maxsize,)):
                found += rule(node, graph)
    return found + check(model)


# Without accelerators, as far as NVIDIA says: 10.7 was the last 10 to have them, and 11.4 brings them back.
_NO_DLA = ((10, 8), (11, 4))


def lint_for_dla(model: onnx.ModelProto, version: str, precision: str) -> list[Finding]:
    """What keeps a deep learning accelerator from computing the model, so that the GPU does it; nothing is rejected."""

    def slow(rule: str, reason: str, fix: str) -> Finding:
        return Finding("model", rule, "slow", f"the DLA was asked for, and {reason}: the GPU computes it", fix)

    found = []
    if _NO_DLA[0] <= version_of(version) < _NO_DLA[1]:
        found.append(slow("dla release", f"TensorRT {version} has none", "set dla_core = -1"))
    if precision == "fp32":
        found.append(slow("dla precision", "it computes in FP16 and INT8 alone", "set quantize.method = fp16 or ptq"))
    if precision == "int8" and version_of(version) < _NO_DLA[1]:
        found.append(slow("dla rounding", "it takes no Q/DQ pairs before 11.4", "set quantize.method = fp16"))
    if any(not value.type.tensor_type.shape.dim[0].dim_value for value in model.graph.input):
        found.append(slow("dla shape", "it takes fixed sizes alone", "set export.batch = static"))
    return found


def _found(node: onnx.NodeProto, rule: str, reason: str, fix: str) -> Finding:
    return Finding(node.name or node.output[0], rule, "rejected", reason, fix)


def _opset(model: onnx.ModelProto, release: Release, version: str) -> Iterator[Finding]:
    opset = opset_of(model)
    if opset > release.opset:
        reason = f"the model is of opset {opset}; TensorRT {version} reads up to {release.opset}"
        yield Finding("model", "opset", "rejected", reason, f"export with opset {release.opset} or lower")


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators."""
    return next((entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), 1)


def _inputs(graph: Graph) -> Iterator[Finding]:
    for value in graph.model.graph.input:
        shape = value.type.tensor_type.shape.dim
        open_axes = [axis for axis, dimension in enumerate(shape) if not dimension.dim_value]
        if value.name not in graph.constants and any(axis > 0 for axis in open_axes):
            axes = ", ".join(map(str, open_axes))
            reason = f"its sizes along the axes {axes} are open, and no profile says between what"
            yield Finding(value.name, "dynamic shape", "rejected", reason, "leave the batch size open at most")


def _operator(node: onnx.NodeProto, model: onnx.ModelProto, release: Release, version: str) -> Iterator[Finding]:
    if node.domain not in STANDARD_DOMAINS:
        if (node.domain, node.op_type) not in {(one.domain, one.name) for one in model.functions}:
            reason = f"{node.op_type} is of the domain {node.domain}, for which there is no plugin"
            yield _found(node, "domain", reason, "export with the standard operators only")
        return
    if node.op_type in release.operators or _is_integer_operator(node):
        return
    if (first := release.since.get(node.op_type)) is None:
        yield _found(node, "operator", f"TensorRT has no {node.op_type}", "replace it in the network's forward")
        return
    parts = _IN_PARTS.get(node.op_type, "simpler operators")
    reason = f"{node.op_type} is taken from TensorRT {first} on, not by {version}"
    yield _found(node, "operator", reason, f"write it as {parts}")


def _is_integer_operator(node: onnx.NodeProto) -> bool:
    """Whether the rules of Q/DQ graphs have a word of their own for it."""
    return "Integer" in node.op_type or node.op_type.startswith(("QLinear", "Dynamic"))


def _tensor_types(node: onnx.NodeProto) -> Iterator[Finding]:
    to = attributes(node).get("to") if node.op_type == "Cast" else None
    if to in _TYPES:
        reason = f"it makes {_TYPES[to]}, which no tensor inside the network may be"
        yield _found(node, "type", reason, "cast to INT32, or to FLOAT")


def _pool(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    given = attributes(node)
    if node.op_type == "MaxPool" and len(node.output) > 1 and node.output[1]:
        yield _found(node, "pool", "its output Indices is not made", "pool without indices")
    if any(step != 1 for step in given.get("dilations", ())):
        yield _found(node, "pool", f"its dilations are {list(given['dilations'])}", "pool with dilation 1")


def _resize(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    mode = attributes(node).get("mode", b"nearest").decode()
    if mode not in ("nearest", "linear"):
        yield _found(node, "resize", f"its mode is {mode}", "resize by nearest or linear")
    if attributes(node).get("antialias", 0):
        yield _found(node, "resize", "it asks for antialiasing", "resize without antialiasing")
    policy = attributes(node).get("keep_aspect_ratio_policy", b"stretch").decode()
    if policy != "stretch":
        yield _found(node, "resize", f"its aspect ratio policy is {policy}", "give the size of both axes")
    if attributes(node).get("coordinate_transformation_mode", b"half_pixel") == b"tf_crop_and_resize":
        yield _found(node, "resize", "its coordinates are of a part of the image", "crop first, then resize")


def _topk(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    k = graph.constants.get(node.input[1])
    if k is None:
        yield _found(node, "topk", "its k is not constant", "fix k in the network's forward")
    elif int(np.max(k)) >= _MOST_FOUND:
        yield _found(node, "topk", f"its k is {int(np.max(k))}", f"ask for fewer than {_MOST_FOUND}")
    if not attributes(node).get("sorted", 1):
        yield _found(node, "topk", "it leaves the values unsorted", "ask for sorted values")


def _normalization(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    if any(node.output[1:]):
        yield _found(node, "normalization", "it gives mean and deviation too", "normalise without these outputs")


def _scatter(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    reduction = attributes(node).get("reduction", b"none").decode()
    if reduction != "none":
        yield _found(node, "scatter", f"its reduction is {reduction}", "scatter without reduction")


def _einsum(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    equation = attributes(node)["equation"].decode()
    terms = re.split(r",|->", equation.replace(" ", ""))
    if "..." in equation or any(len(set(term)) < len(term) for term in terms):
        yield _found(node, "einsum", f"{equation} has an ellipsis or a diagonal", "write it with matmul and sums")


def _weights(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    """Constant, or the rounding of a constant."""
    name = node.input[1]
    while (maker := graph.makers.get(name)) is not None and maker.op_type in PAIR:
        name = maker.input[0]
    if name not in graph.constants:
        yield _found(node, "weights", f"its weights {node.input[1]} are not constant", "make them a parameter")


def _depth(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    if node.input[1] not in graph.constants:
        yield _found(node, "onehot", "its depth is not constant", "fix the number of classes in the network's forward")


def _limits(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    if open_limits := [name for name in node.input[2:] if name and name not in graph.constants]:
        yield _found(node, "limits", f"{', '.join(open_limits)} are not constant", "fix them in the network's forward")


def _axes(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    axes = (*node.input, "", "", "")[_AXES[node.op_type]]
    if axes and axes not in graph.constants:
        yield _found(node, "axes", "its axes are not constant", "fix them in the network's forward")


def _pair_type(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    """Codes that no release takes; of 8-bit floats, that no chip before Thor's computes."""
    for kind in sorted(_kinds(node, graph)):
        if kind.startswith("float8"):
            reason = f"its codes are {kind.upper()}, which Orin and older chips do not compute"
            yield _found(node, "type", reason, "quantize to INT8")
        elif kind in ("int16", "uint16", "uint4"):
            yield _found(node, "type", f"its codes are {kind.upper()}", "quantize to symmetric INT8")


def _four_bits(node: onnx.NodeProto, graph: Graph) -> Iterator[Finding]:
    if "int4" in _kinds(node, graph):
        yield _found(node, "type", "its codes are INT4, taken from TensorRT 10.0 on", "quantize to INT8")


def _kinds(node: onnx.NodeProto, graph: Graph) -> set[str]:
    """The types of a rounding's codes, as far as constants say: the codes themselves, or the zero point."""
    names = (node.input[0], *node.input[2:3]) if node.op_type == "DequantizeLinear" else node.input[2:3]
    return {str(graph.constants[name].dtype.name) for name in names if name in graph.constants}


_BY_OPERATOR: dict[str, tuple[Callable[[onnx.NodeProto, Graph], Iterator[Finding]], ...]] = {
    **dict.fromkeys(_POOLS, (_pool,)),
    **dict.fromkeys(_AXES, (_axes,)),
    **dict.fromkeys(PAIR, (_pair_type, _four_bits)),
    **dict.fromkeys(("Conv", "ConvTranspose"), (_weights,)),
    "Einsum": (_einsum,),
    "LayerNormalization": (_normalization,),
    "NonMaxSuppression": (_limits,),
    "OneHot": (_depth,),
    "Resize": (_resize,),
    "TopK": (_topk,),
    "ScatterND": (_scatter,),
}
# Restrictions that a release has lifted.
_UNTIL: dict[Callable[[onnx.NodeProto, Graph], Iterator[Finding]], tuple[int, ...]] = {
    _einsum: (10, 0),
    _four_bits: (10, 0),
    _weights: (8, 5),
    _limits: (8, 5),
}
