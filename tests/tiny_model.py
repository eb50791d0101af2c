"""A network of five nodes, for backends to compile."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def tiny_onnx(path, batch="batch", operator="Relu", domain="", opset=18):
    """conv 3x3 (3 to 4 channels), an activation, mean over the image, 4 to 5 classes; images are 6x6."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, 3, 3, 3)).astype(np.float32), rng.standard_normal((4, 5)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["convolved"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node(operator, ["convolved"], ["active"], domain=domain, name="activation"),
        helper.make_node("GlobalAveragePool", ["active"], ["mean"], name="pool"),
        helper.make_node("Flatten", ["mean"], ["flat"], name="flatten"),
        helper.make_node("MatMul", ["flat", "matrix"], ["logits"], name="classifier"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 6, 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(array, name) for array, name in zip(weights, ("kernel", "matrix"), strict=True)],
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def tiny_numpy(x):
    """What tiny_onnx computes: x float32 [B, 3, 6, 6] -> [B, 5]."""
    rng = np.random.default_rng(0)
    kernel, matrix = (
        rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        rng.standard_normal((4, 5)).astype(np.float32),
    )
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.maximum(np.einsum("bchwij,ocij->bohw", windows, kernel), 0).mean(axis=(2, 3)) @ matrix
