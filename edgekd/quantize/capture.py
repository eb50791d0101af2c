"""A torch network as a flat graph of operators, and the same graph as the rules of placement read it.

Layers whose computation depends on training or evaluation (batch normalisation, dropout), and LMA with its own kernels,
stay modules: torch.export sees one opaque operator in place of each, which `restored` turns back into the layer.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from edgekd.activations import LMA
from edgekd.errors import ExportError
from edgekd.export import quiet, reason
from edgekd.marks import LMA_MARK
from edgekd.quantize.graph import LMA_DOMAIN, Graph
from edgekd.quantize.placement import Reader

Edge = tuple[fx.Node, fx.Node]  # from the node that makes a tensor to one that reads it
_LEAVES = (LMA, nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")  # the exporter folds a normalisation behind one of these into it
_aten = torch.ops.aten
# Operators of torch by those of ONNX that the rules of placement know; all others are strangers to them.
_OPERATORS: Mapping[Any, str] = {
    _aten.conv1d.default: "Conv", _aten.conv1d.padding: "Conv", _aten.conv2d.default: "Conv",
    _aten.conv2d.padding: "Conv", _aten.conv3d.default: "Conv", _aten.conv3d.padding: "Conv",
    _aten.conv_transpose1d.default: "ConvTranspose", _aten.conv_transpose2d.input: "ConvTranspose",
    _aten.conv_transpose3d.input: "ConvTranspose", _aten.max_pool3d.default: "MaxPool",
    _aten.linear.default: "Gemm", _aten.relu.default: "Relu", _aten.hardtanh.default: "Clip",
    _aten.relu6.default: "Clip", _aten.clamp.default: "Clip", _aten.add.Tensor: "Add", _aten.pad.default: "Pad",
    _aten.constant_pad_nd.default: "Pad", _aten.max_pool1d.default: "MaxPool", _aten.max_pool2d.default: "MaxPool",
    _aten.flatten.using_ints: "Flatten", _aten.view.default: "Reshape", _aten.reshape.default: "Reshape",
    _aten.slice.Tensor: "Slice", _aten.permute.default: "Transpose", _aten.transpose.int: "Transpose",
    _aten.squeeze.dims: "Squeeze", _aten.unsqueeze.default: "Unsqueeze", _aten.alias.default: "Identity",
    _aten.clone.default: "Identity", _aten.contiguous.default: "Identity",
}  # fmt: skip


@torch.library.custom_op("edgekd::layer", mutates_args=())
def _layer(x: Tensor, name: str) -> Tensor:
    """What torch.export sees of a layer that stays a module: any shape -> the same shape."""
    return x.clone()


@_layer.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


class _Opaque(nn.Module):
    """Stands for the layer of that name while the network is captured."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        y: Tensor = _layer(x, self.name)
        return y


@dataclass(frozen=True)
class Captured:
    """A network without its control flow.

    module: its operators, any batch size. layers: what stays a module, by name. graph: the network at test time, each
    tensor under the name of the node in `module` that makes it. edges: where a reader of `graph` gets its tensor.
    """

    module: fx.GraphModule
    layers: Mapping[str, nn.Module]
    graph: Graph
    edges: Mapping[Reader, Edge]


def capture(network: nn.Module, image: Tensor) -> Captured:
    """Trace a copy of the network at test time; image: [1, C, H, W].

    Raises ExportError when torch.export cannot trace it for any batch size.
    """
    traced = copy.deepcopy(network).eval()
    layers = {name: module for name, module in traced.named_modules(remove_duplicate=False) if _stays(module)}
    for name in layers:
        parent, _, attribute = name.rpartition(".")
        setattr(traced.get_submodule(parent), attribute, _Opaque(name))
    try:
        # A batch of one would be taken for a constant.
        shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
        with quiet():
            program = torch.export.export(traced, (torch.cat((image, image)),), dynamic_shapes=shapes, strict=False)
            module = program.run_decompositions({}).module(check_guards=False)  # what works in place no longer does
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace the network: {reason(error)}",
            allowed="needed for training with rounding: a forward without branches on data, for any batch size",
            fix="change the network's forward, or set quantize.method = ptq; the whole report: run with --debug",
        ) from error
    assert isinstance(module, fx.GraphModule)
    return Captured(module, layers, *_Skeleton(module, layers).built(image))


def restored(module: fx.GraphModule, layers: Mapping[str, nn.Module]) -> fx.GraphModule:
    """The captured operators with the layers that stayed modules in their places; `train()` and `eval()` reach them."""
    for name, layer in layers.items():
        module.add_submodule(name, layer)
    for node in list(module.graph.nodes):
        if node.target is torch.ops.edgekd.layer.default:
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.call_module(node.args[1], (node.args[0],)))
            module.graph.erase_node(node)
        elif node.target is _aten.view.default:
            node.target = _aten.reshape.default  # the same, also of what lies in memory with its channels last
    # One tensor in, one out: without the export's description of nested arguments, which warns when it is copied.
    module.graph.output_node().args = (module.graph.output_node().all_input_nodes[0],)
    module.graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(module, module.graph)


def _stays(module: nn.Module) -> bool:
    return isinstance(module, _LEAVES)


class _Skeleton:
    """The ONNX graph of a captured network, as far as the rules of placement look at it."""

    def __init__(self, module: fx.GraphModule, layers: Mapping[str, nn.Module]) -> None:
        self.module, self.layers = module, layers
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.edges: dict[Reader, Edge] = {}
        # Nodes that hold the values of another one at test time: that one, and the edge which leads away from it.
        self.same: dict[fx.Node, Edge] = {}

    def built(self, image: Tensor) -> tuple[Graph, dict[Reader, Edge]]:
        """The graph for images [1, C, H, W], and the edge behind each of its readers."""
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                value: Any = functools.reduce(getattr, node.target.split("."), self.module)
                self.constants.append(numpy_helper.from_array(value.detach().cpu().numpy(), node.target))
            elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
                self._operator(node)
        (given,) = (node for node in self.module.graph.nodes if node.op == "placeholder")
        (answer,) = self.module.graph.output_node().all_input_nodes
        inputs = [helper.make_tensor_value_info(given.name, TensorProto.FLOAT, [None, *image.shape[1:]])]
        outputs = [helper.make_tensor_value_info(self._edge(answer, answer)[0].name, TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "captured", inputs, outputs, self.constants)
        return Graph(helper.make_model(graph)), self.edges

    def _operator(self, node: fx.Node) -> None:
        layer = self._layer(node)
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            source = node.all_input_nodes[0]
            self.same[node] = self._edge(source, node)
        elif isinstance(layer, LMA):
            self._write("LMA", node, domain=LMA_DOMAIN).metadata_props.add(key=LMA_MARK, value=str(node.args[1]))
        elif layer is not None:
            if not self._folds(node):
                self._write("BatchNormalization", node)
        elif (operator := _OPERATORS.get(node.target)) and _is_plain(node, operator):
            self._write(operator, node, **{"transB": 1} if operator == "Gemm" else {})
        else:
            self._write(str(node.target), node, domain="torch")

    def _write(self, operator: str, node: fx.Node, **options: Any) -> onnx.NodeProto:
        edges = [self._edge(source, node) for source in node.args if isinstance(source, fx.Node)]
        edges += [self._edge(source, node) for source in node.all_input_nodes if source not in node.args]
        self.edges.update({(len(self.nodes), at): edge for at, edge in enumerate(edges)})
        users = list(node.users)
        made = users[0] if len(users) == 1 and self._folds(users[0]) else node
        read = [str(source.target) if source.op == "get_attr" else source.name for source, _ in edges]
        written = helper.make_node(operator, read, [made.name], node.name, **options)
        self.nodes.append(written)
        return written

    def _edge(self, source: fx.Node, reader: fx.Node) -> Edge:
        return self.same.get(source, (source, reader))

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self.layers[str(node.args[1])] if node.target is torch.ops.edgekd.layer.default else None

    def _folds(self, node: fx.Node) -> bool:
        """Whether a node is a batch normalisation that becomes a part of the layer before it."""
        before = node.all_input_nodes[0] if isinstance(self._layer(node), nn.modules.batchnorm._BatchNorm) else None
        return before is not None and len(before.users) == 1 and _OPERATORS.get(before.target) in _WEIGHTED


def _is_plain(node: fx.Node, operator: str) -> bool:
    """Whether an operator of torch is what ONNX has under that name: of two tensors, of rank 2."""
    if operator == "Add":
        return len(node.all_input_nodes) == 2 and not node.kwargs
    if operator == "Gemm":
        return bool(node.args[0].meta["val"].dim() == 2)  # type: ignore[union-attr]
    return True
