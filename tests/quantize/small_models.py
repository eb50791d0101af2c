"""Small exported networks, and plain spellings of what quantization computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

SHAPE = (3, 12, 12)
CLASSES = 5


def images(n: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


def run(model: onnx.ModelProto, x: np.ndarray, tensor: str = "", optimize: bool = False) -> np.ndarray:
    """A model's first output, or any tensor of it, by default exactly as the graph is written."""
    if tensor:
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        del shown.graph.output[:]
        shown.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
        model = shown
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def residual_model(seed: int = 0, *, opset: int = 20, marked: bool = True) -> onnx.ModelProto:
    """stem -> ReLU -> conv1 -> LMA -> conv2 -> Add(stem's ReLU) -> ReLU -> MaxPool -> flatten -> fc, spelled by hand.

    The LMA is a ReLU and a line, of the nodes that `relu_sum` makes.
    """
    rng = np.random.default_rng(seed)

    def conv(name: str, x: str, y: str, channels: int) -> onnx.NodeProto:
        weights = rng.standard_normal((4, channels, 3, 3)) / np.sqrt(9 * channels)
        weights *= np.linspace(0.2, 2, 4).reshape(-1, 1, 1, 1)
        constant(f"{name}.weight", weights)
        constant(f"{name}.bias", rng.standard_normal(4) / 4)
        return helper.make_node("Conv", [x, f"{name}.weight", f"{name}.bias"], [y], name, pads=[1, 1, 1, 1])

    constants: list[TensorProto] = []

    def constant(name: str, values: object, dtype: type = np.float32) -> None:
        constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))

    def lma(node: onnx.NodeProto) -> onnx.NodeProto:
        if marked:
            node.metadata_props.add(key="edgekd.lma", value="act")
        return node

    constant("slope", 0.25)
    constant("cut", 0.1)
    constant("step", 0.5)
    constant("shape", [0, -1], np.int64)
    constant("fc.weight", rng.standard_normal((CLASSES, 4 * 36)) / 12)
    constant("fc.bias", rng.standard_normal(CLASSES))
    nodes = [
        conv("stem", "images", "a", SHAPE[0]),
        helper.make_node("Relu", ["a"], ["b"], "relu_1"),
        conv("conv1", "b", "c", 4),
        lma(helper.make_node("Mul", ["c", "slope"], ["line"], "lma_line")),
        lma(helper.make_node("Sub", ["c", "cut"], ["above"], "lma_above")),
        lma(helper.make_node("Relu", ["above"], ["kink"], "lma_relu")),
        lma(helper.make_node("Mul", ["kink", "step"], ["scaled"], "lma_scaled")),
        lma(helper.make_node("Add", ["line", "scaled"], ["d"], "lma_sum")),
        conv("conv2", "d", "e", 4),
        helper.make_node("Add", ["e", "b"], ["f"], "add"),
        helper.make_node("Relu", ["f"], ["g"], "relu_2"),
        helper.make_node("MaxPool", ["g"], ["h"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["h", "shape"], ["i"], "flatten"),
        helper.make_node("Gemm", ["i", "fc.weight", "fc.bias"], ["logits"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def rounded(x: np.ndarray, scale: float | np.ndarray) -> np.ndarray:
    """Symmetric INT8 and back, by its definition."""
    return (np.clip(np.rint(x / np.float32(scale)), -128, 127) * np.float32(scale)).astype(np.float32)
