"""An ONNX graph as a quantizer sees it: layers with weights, residual additions, multi-segment activations."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from edgekd.errors import DataError
from edgekd.marks import LMA_MARK

Array = npt.NDArray[Any]
T = TypeVar("T", onnx.ModelProto, onnx.NodeProto, onnx.TensorProto)

LMA_DOMAIN = "edgekd"  # of the model-local function edgekd.LMA, one node for a whole layer
STANDARD_DOMAINS = ("", "ai.onnx")
PER_CHANNEL_OPSET = 13  # the first whose Q/DQ pairs take one scale for each channel
HALF = "_fp16"  # behind the name of a tensor: the same in half precision
# Rounding before one of these is rounding after it: they move values and make none. Pad makes zeros, which are exact.
MOVES_VALUES = ("Flatten", "Identity", "MaxPool", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
# Where each operator keeps its output channels in the weight [axis]; Gemm and MatMul see `_channel_axis`.
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Layer:
    """A node with constant weights: what INT8 makes fast."""

    name: str  # the torch module's, where the weight is called after it
    node: onnx.NodeProto
    weight: Array
    channel_axis: int

    @property
    def input(self) -> str:
        """The activation that it reads."""
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        """What it makes, before any activation."""
        return str(self.node.output[0])


@dataclass(frozen=True)
class Segmented:
    """The nodes of one LMA layer."""

    name: str
    nodes: tuple[onnx.NodeProto, ...]
    input: str
    output: str


@dataclass(frozen=True)
class Residual:
    """An addition of two activations: `branch` is the deeper one, `skip` the one that went around."""

    node: onnx.NodeProto
    branch: str
    skip: str


@dataclass
class Graph:
    """A model with what is asked of it again and again. The model must not change under it."""

    model: onnx.ModelProto
    makers: dict[str, onnx.NodeProto] = field(init=False)
    users: dict[str, list[onnx.NodeProto]] = field(init=False)
    constants: dict[str, Array] = field(init=False)
    layers: list[Layer] = field(init=False)
    lma: list[Segmented] = field(init=False)
    residuals: list[Residual] = field(init=False)

    def __post_init__(self) -> None:
        nodes = self.model.graph.node
        self.makers = {name: node for node in nodes for name in node.output}
        self.users = collections.defaultdict(list)
        for node in nodes:
            for name in dict.fromkeys(node.input):
                self.users[name].append(node)
        self.constants = dict(_constants(self.model))
        self.lma = list(self._lma())
        inside = {id(node) for region in self.lma for node in region.nodes}
        outside = [node for node in nodes if id(node) not in inside]
        self.layers = list(self._layers(outside))
        self.residuals = list(self._residuals(outside))

    @property
    def image(self) -> onnx.ValueInfoProto:
        """The one input that is no constant. Raises DataError when there is another."""
        inputs = [value for value in self.model.graph.input if value.name not in self.constants]
        if len(inputs) != 1:
            names = ", ".join(value.name for value in inputs) or "none"
            raise DataError(
                f"the model has {len(inputs)} inputs: {names}",
                allowed="allowed: one input, float32 [B, C, H, W]",
                fix="export the network with its images as the only input",
            )
        image: onnx.ValueInfoProto = inputs[0]
        return image

    @property
    def outputs(self) -> set[str]:
        """Names of the graph's outputs."""
        return {value.name for value in self.model.graph.output}

    def source(self, name: str) -> str:
        """The tensor whose values `name` holds, maybe moved: one scale serves both."""
        while (node := self.makers.get(name)) is not None and self._moves_values(node):
            name = node.input[0]
        return name

    def first_mover(self, name: str) -> onnx.NodeProto | None:
        """The first of the nodes that move the values of `source(name)` to `name`; None when nothing moves them."""
        mover, source = None, self.source(name)
        while name != source:
            mover = self.makers[name]
            name = mover.input[0]
        return mover

    def activated(self, layer: Layer) -> str:
        """What a layer and the activation behind it make: a ReLU, a Clip or an LMA; else the layer's own output."""
        users = self.users[layer.output]
        if len(users) == 1 and users[0].op_type in ("Relu", "Clip", "LeakyRelu"):
            return str(users[0].output[0])
        return next((region.output for region in self.lma if region.input == layer.output), layer.output)

    def _moves_values(self, node: onnx.NodeProto) -> bool:
        # The last node of an LMA may be a Reshape: its values are made inside.
        return node.op_type in MOVES_VALUES and not lma_name(node) and _pads_zero(node, self)

    def _layers(self, nodes: Iterable[onnx.NodeProto]) -> Iterator[Layer]:
        for node in nodes:
            if node.op_type not in _WEIGHTED or node.domain not in STANDARD_DOMAINS or node.input[0] in self.constants:
                continue
            weight = self.constants.get(node.input[1])
            if weight is None or weight.dtype != np.float32 or weight.ndim < 2:
                continue
            yield Layer(node.input[1].removesuffix(".weight"), node, weight, _channel_axis(node, weight))

    def _lma(self) -> Iterator[Segmented]:
        regions: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            if node.domain == LMA_DOMAIN and node.op_type == "LMA":
                regions[lma_name(node) or node.output[0]] = [node]
            elif name := lma_name(node):
                regions.setdefault(name, []).append(node)
        for name, nodes in regions.items():
            made = {output for node in nodes for output in node.output}
            read = dict.fromkeys(i for node in nodes for i in node.input if i and i not in self.constants)
            entries = [tensor for tensor in read if tensor not in made and self._depends_on_image(tensor)]
            read_outside = {i for node in self.model.graph.node if node not in nodes for i in node.input} | self.outputs
            exits = sorted(made & read_outside)
            if len(entries) == 1 and len(exits) == 1:
                yield Segmented(name, tuple(nodes), entries[0], exits[0])

    def _depends_on_image(self, name: str) -> bool:
        image, todo, seen = self.image.name, [name], set()
        while todo:
            tensor = todo.pop()
            if tensor == image:
                return True
            if tensor in self.makers and tensor not in seen:
                seen.add(tensor)
                todo.extend(self.makers[tensor].input)
        return False

    def _residuals(self, nodes: Iterable[onnx.NodeProto]) -> Iterator[Residual]:
        depth: dict[str, int] = {}
        for node in self.model.graph.node:
            below = 1 + max((depth.get(name, 0) for name in node.input), default=0)
            depth.update(dict.fromkeys(node.output, below))
        direct = {layer.output for layer in self.layers}
        for node in nodes:
            if node.op_type == "Add" and not any(name in self.constants for name in node.input):
                skip, branch = sorted(node.input, key=lambda name: (name in direct, depth.get(name, 0)))
                if skip != branch:
                    yield Residual(node, branch, skip)


def load(file: Path) -> Graph:
    """Read a float model that can be quantized. Raises DataError for a file that is none."""
    try:
        model = onnx.load(str(file))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, onnx and the operating system have no common error
        raise DataError(
            f"{file} is not a valid ONNX model: {(str(error).strip().splitlines() or [type(error).__name__])[0][:160]}",
            fix="export the network again",
        ) from None
    foreign = sorted({node.domain for node in model.graph.node} - {*STANDARD_DOMAINS, LMA_DOMAIN})
    if foreign:
        raise DataError(
            f"{file} has operators of the domain {', '.join(foreign)}, which no other runtime knows",
            allowed="allowed: the standard operators of ONNX, and edgekd.LMA",
            fix="export the network again with the standard operators only",
        )
    opset = next((entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), 0)
    if opset < PER_CHANNEL_OPSET:
        raise DataError(
            f"{file} is of opset {opset}, which has no scales per channel",
            allowed=f"allowed: opset {PER_CHANNEL_OPSET} or later",
            fix="export the network again with a later opset",
        )
    graph = Graph(model)
    done = sorted({node.op_type for node in model.graph.node} & {"QuantizeLinear", "DequantizeLinear"})
    if done:
        raise DataError(f"{file} is quantized already: it has {' and '.join(done)}", fix="give the float model")
    if not graph.layers:
        raise DataError(
            f"{file} has nothing to quantize: no {', '.join(_WEIGHTED[:-1])} or {_WEIGHTED[-1]} with constant weights",
            fix="export the network with its weights in the model",
        )
    return graph


def copied(thing: T) -> T:
    """A model, node or tensor that may be changed."""
    return copy.deepcopy(thing)


def attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    """The attributes of a node as Python values."""
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


def _constants(model: onnx.ModelProto) -> Iterator[tuple[str, Array]]:
    for tensor in model.graph.initializer:
        yield tensor.name, numpy_helper.to_array(tensor)
    for node in model.graph.node:
        if node.op_type == "Constant" and "value" in (found := attributes(node)):
            yield node.output[0], numpy_helper.to_array(found["value"])


def lma_name(node: onnx.NodeProto) -> str:
    """The LMA layer that a node belongs to; empty when it belongs to none."""
    return next((entry.value for entry in node.metadata_props if entry.key == LMA_MARK), "")


def _pads_zero(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether a node that is a Pad pads with zeros: true for every other one."""
    if node.op_type != "Pad":
        return True
    mode = attributes(node).get("mode", b"constant")
    value = graph.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    return mode != b"constant" or (value is not None and not np.any(value))


def _channel_axis(node: onnx.NodeProto, weight: Array) -> int:
    if node.op_type == "Gemm":
        return 0 if attributes(node).get("transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": weight.ndim - 1}[node.op_type]
