"""What a model computes must not change when it is written for an older TensorRT."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.backends.tensorrt.linter import lint, opset_of
from edgekd.backends.tensorrt.prepare import prepared
from edgekd.errors import StageError

node = helper.make_node
X = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
VERSIONS = {"8.2.1": 13, "8.5.2": 17, "8.6.2": 17, "10.3.0": 20}


def graph(*nodes, out=X.shape, opset=20, functions=(), **constants):
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    return helper.make_model(made, opset_imports=opsets, functions=functions, ir_version=10)


def run(model):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


ONES = np.ones(6, np.float32)
TWICE = helper.make_function(
    "mine", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 20)]
)
MODELS = {
    "pad and mean": graph(
        node("Pad", ["x", "pads"], ["padded"]), node("ReduceMean", ["padded", "axes"], ["y"], keepdims=0),
        pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]), axes=np.array([2, 3]), out=[2, 4],
    ),
    "reshape": graph(node("Reshape", ["x", "shape"], ["y"], allowzero=1), shape=np.array([2, -1]), out=[2, 144]),
    "pair": graph(
        node("QuantizeLinear", ["x", "scale", "zero"], ["q"], saturate=1),
        node("DequantizeLinear", ["q", "scale", "zero"], ["y"]), scale=np.float32(0.1), zero=np.int8(0),
    ),
    "function": graph(node("Twice", ["x"], ["y"], domain="mine"), functions=[TWICE]),
    "gelu": graph(node("Gelu", ["x"], ["y"])),
    "mish": graph(node("Mish", ["x"], ["y"])),
    "hard swish": graph(node("HardSwish", ["x"], ["y"])),
    "comparison": graph(
        node("Greater", ["x", "one"], ["above"]), node("Where", ["above", "x", "one"], ["y"]), one=np.float32(1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MODELS)
def test_an_older_release_gets_what_it_reads_and_computes_the_same(name, version):
    before = MODELS[name].SerializeToString(deterministic=True)
    model = prepared(MODELS[name], version)
    assert opset_of(model) == min(20, VERSIONS[version])
    assert lint(model, version) == []
    np.testing.assert_allclose(run(model), run(MODELS[name]), rtol=1e-5, atol=1e-6)
    assert MODELS[name].SerializeToString(deterministic=True) == before


def test_layer_normalization_is_written_out_before_8_6():
    model = graph(node("LayerNormalization", ["x", "ones", "zeros"], ["y"]), ones=ONES, zeros=0 * ONES)
    assert [one.op_type for one in prepared(model, "8.6").graph.node] == ["LayerNormalization"]
    written_out = prepared(model, "8.5")
    assert lint(written_out, "8.5") == []
    np.testing.assert_allclose(run(written_out), run(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "version", "lines"),
    [
        (
            graph(node("Resize", ["x", "", "s"], ["y"], "up", antialias=1, mode="linear"), s=np.ones(4, np.float32)),
            "8.5.2",
            [
                "error: Resize up cannot be written for opset 17: it has no antialias",
                "       the TensorRT of this target reads no later one",
                "fix:   replace the operator in the network's forward, or use a board with a later TensorRT",
            ],
        ),
        (
            graph(node("Magic", ["x"], ["y"], domain="mine")),
            "10.3",
            [
                "error: the model has operators of the domain mine, for which TensorRT has no plugin",
                "       allowed: the standard operators of ONNX, and functions of them that the model itself defines",
                "fix:   export the network with the standard operators only",
            ],
        ),
    ],
)
def test_what_cannot_be_written_is_said(model, version, lines):
    with pytest.raises(StageError) as caught:
        prepared(model, version)
    assert str(caught.value).splitlines() == lines


def test_axes_that_are_computed_cannot_become_an_attribute():
    model = graph(
        node("Identity", ["zero"], ["axes"]), node("ReduceMean", ["x", "axes"], ["y"], "mean"), zero=np.array([0])
    )
    with pytest.raises(StageError, match="ReduceMean mean cannot be written for opset 17: it has no input 1"):
        prepared(model, "8.6")


def test_the_checker_knows_the_result(tmp_path):
    onnx.save(prepared(MODELS["pad and mean"], "8.2"), tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
