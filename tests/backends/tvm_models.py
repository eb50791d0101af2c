"""ONNX models that TVM is tested with."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from edgekd import registry
from edgekd.activations import multi_segment_layers
from edgekd.export import export


def joined_model(path, shape, branches, batch="batch"):
    """Branches (nodes from "x" to the branch's name, arrays by name), each flattened, joined to one output."""
    nodes, arrays = [], {}
    for name, (part, constants) in branches.items():
        nodes += [*part, helper.make_node("Flatten", [name], [f"{name}.flat"])]
        arrays |= constants
    nodes.append(helper.make_node("Concat", [f"{name}.flat" for name in branches], ["logits"], axis=1))
    graph = helper.make_graph(
        nodes,
        "joined",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, None])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def convolution(name, channels, out, kernel, bias=True, group=1, kind="Conv", **attributes):
    rng = np.random.default_rng(len(name))
    shape = (out, channels // group) if kind == "Conv" else (channels, out // group)
    arrays = {f"{name}.w": rng.standard_normal((*shape, *kernel)).astype(np.float32) / 4}
    if bias:
        arrays[f"{name}.b"] = rng.standard_normal(out).astype(np.float32)
    return [helper.make_node(kind, ["x", *arrays], [name], group=group, **attributes)], arrays


transposed = functools.partial(convolution, kind="ConvTranspose")

CONVOLUTIONS = {
    "plain": convolution("plain", 12, 16, (3, 3), pads=[1, 1, 1, 1]),
    "odd": convolution("odd", 12, 25, (5, 5), pads=[2, 2, 2, 2]),
    "few": convolution("few", 12, 5, (3, 3), bias=False),
    "pointwise": convolution("pointwise", 12, 40, (1, 1)),
    "strided": convolution("strided", 12, 24, (3, 3), strides=[2, 2], pads=[0, 1, 1, 0]),
    "dilated": convolution("dilated", 12, 8, (3, 3), dilations=[2, 1], pads=[2, 1, 2, 1]),
    "oblong": convolution("oblong", 12, 8, (1, 5), strides=[1, 2]),
    "grouped": convolution("grouped", 12, 18, (3, 3), group=3, pads=[1, 1, 1, 1]),
    "depthwise": convolution("depthwise", 12, 12, (3, 3), group=12, pads=[1, 1, 1, 1], strides=[2, 2]),
    "multiplied": convolution("multiplied", 12, 24, (3, 3), group=12),
}


def operator(name, kind, *others, arrays=None, **attributes):
    inputs = ["", *others]
    inputs[0] = "c"
    return name, kind, inputs, arrays or {}, attributes


per_channel = np.linspace(-1, 1, 8, dtype=np.float32)
OPERATORS = [
    operator("relu", "Relu"), operator("sigmoid", "Sigmoid"), operator("swish", "HardSwish"), operator("tanh", "Tanh"),
    operator("leaky", "LeakyRelu", alpha=0.1), operator("identity", "Identity"),
    operator("clip", "Clip", "low", "high", arrays={"low": np.float32(-0.5), "high": np.float32(6)}),
    operator("clip_below", "Clip", "low0", arrays={"low0": np.float32(0)}),
    operator("maximum", "Max", "cut", arrays={"cut": np.float32(0.25)}),
    operator("scaled", "Mul", "slopes", arrays={"slopes": per_channel.reshape(1, 8, 1, 1)}),
    operator("moved", "Add", "offsets", arrays={"offsets": per_channel.reshape(8, 1, 1)}),
    operator("prelu", "PRelu", "slope", arrays={"slope": per_channel.reshape(8, 1, 1)}),
    operator("norm", "BatchNormalization", "g", "b", "m", "v", epsilon=1e-3,
             arrays={"g": per_channel + 2, "b": per_channel, "m": per_channel / 2, "v": per_channel + 1.5}),
    operator("max_pool", "MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
    operator("max_pool_padded", "MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    operator("average_pool", "AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    operator("average_of_all", "AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    operator("mean", "ReduceMean", "axes", keepdims=0, arrays={"axes": np.array([-1, 2])}),
    operator("channel_mean", "ReduceMean", "channel", arrays={"channel": np.array([1])}),
    operator("global", "GlobalAveragePool"),
    operator("sliced", "Slice", "starts", "ends", "axis", "steps",
             arrays={"starts": np.array([0, 1]), "ends": np.array([2**31, 7]), "axis": np.array([2, 3]),
                     "steps": np.array([2, 2])}),
    operator("padded", "Pad", "pads", arrays={"pads": np.array([0, 4, 0, 1, 0, 4, 2, 0])}),
    operator("joined", "Concat", "x", axis=1), operator("moved_axes", "Transpose", perm=[0, 2, 3, 1]),
    operator("softmax", "Softmax", axis=1),
]  # fmt: skip


def branches(operators, *shape):
    """A convolution `c` with weights of this shape, and operators that read it."""
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32) / 4
    found = {"c": ([helper.make_node("Conv", ["x", "k"], ["c"], pads=[1] * 2 * (kernel.ndim - 2))], {"k": kernel})}
    for name, kind, inputs, arrays, attributes in operators:
        found[name] = ([helper.make_node(kind, inputs, [name], **attributes)], arrays)
    return found


def operators_model(path, shape):
    """OPERATORS behind a convolution."""
    return joined_model(path, shape, branches(OPERATORS, 8, shape[0], 3, 3))


def stack(path, activation, form="where", **options):
    """Two convolutions with an activation behind each, and a residual."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1)]
    activations = [registry.create("activation", activation, 8, options=options) for _ in layers]

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.activations = torch.nn.ModuleList(layers), torch.nn.ModuleList(activations)

        def forward(self, x):
            first = self.activations[0](self.layers[0](x))
            return self.activations[1](self.layers[1](first) + first).mean((2, 3))

    network = Stack().eval()
    for _, layer in multi_segment_layers(network):
        torch.nn.init.normal_(layer.slope_deltas, 0, 0.3)
        torch.nn.init.normal_(layer.biases, 0, 0.1)
    example = np.zeros((1, 3, 8, 8), np.float32)
    export(network, path, example=example, opset=20, dynamic_batch=False, form=form, metadata={})
    return path
