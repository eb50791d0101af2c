"""Each rule on the smallest graph that breaks it; and where the compiler is at hand, it must agree."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.backends.tensorrt import compiler
from edgekd.backends.tensorrt.linter import lint, lint_for_dla
from edgekd.backends.tensorrt.releases import release_of, releases

node = helper.make_node
IMAGE = (1, 4, 8, 8)
NEWEST = "10.15"
# y = axes, an INT64 tensor that depends on the image.
AXES = (
    node("ReduceMax", ["x"], ["largest"], keepdims=0),
    node("Cast", ["largest"], ["whole"], to=TensorProto.INT64),
    node("Reshape", ["whole", "one"], ["axes"]),
)
ONE = {"one": np.array([1])}


def graph(*nodes, shape=IMAGE, opset=20, functions=(), **constants):
    """x -> y through the nodes; the last is called `it`, if it is not the `end`."""
    next(one for one in reversed(nodes) if one.name != "end").name = "it"
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("my.ops", 1)]
    return helper.make_model(made, opset_imports=opsets, functions=functions, ir_version=10)


def pair(**constants):
    """A rounding of the image, with its constants changed."""
    constants = {"scale": np.float32(0.1), "zero": np.int8(0), **constants}
    names = ["scale", *(["zero"] if constants["zero"] is not None else [])]
    nodes = node("QuantizeLinear", ["x", *names], ["q"]), node("DequantizeLinear", ["q", *names], ["y"], "end")
    return graph(*nodes, opset=21, **{name: value for name, value in constants.items() if value is not None})


def weights_of(kind, opset=21):
    """A product with weights that are stored as codes of a type, with scales for every 32 of a column."""
    nodes = (
        node("DequantizeLinear", ["codes", "scale"], ["w"], axis=0, block_size=32),
        node("MatMul", ["x", "w"], ["y"]),
    )
    codes, scale = np.ones((64, 32), kind), np.ones((2, 32), np.float32)
    return graph(*nodes, shape=(1, 64), opset=opset, codes=codes, scale=scale)


def cast_to(kind):
    return node("Cast", ["x"], ["other"], to=kind), node("Cast", ["other"], ["y"], "end", to=TensorProto.FLOAT)


# rule: what breaks it
REJECTED = {
    "domain": [graph(node("Magic", ["x"], ["y"], domain="my.ops"))],
    "operator": [
        graph(node("Det", ["x"], ["y"])),
        graph(
            node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            node("DequantizeLinear", ["q", "s", "z"], ["y"], "end"),
        ),
    ],
    "dynamic shape": [graph(node("Relu", ["x"], ["y"]), shape=("batch", 4, "height", 8))],
    "type": [
        graph(*cast_to(TensorProto.UINT8)),
        graph(*cast_to(TensorProto.INT16)),
        pair(zero=np.int16(0)),
        graph(
            node("DequantizeLinear", ["codes", "scale"], ["bias"]), node("Add", ["x", "bias"], ["y"], "end"),
            codes=np.ones(8, np.int32), scale=np.float32(1),
        ),
        weights_of(ml_dtypes.float8_e4m3fn),
    ],
    "pool": [
        graph(node("MaxPool", ["x"], ["y", "indices"], kernel_shape=[2, 2])),
        graph(node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[2, 2])),
        graph(node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[2, 2])),
    ],
    "topk": [graph(node("TopK", ["x", "k"], ["y", "i"], axis=1), shape=(1, 5000), k=np.array([4000]))],
    "scatter": [
        graph(
            node("ScatterND", ["x", "i", "update"], ["y"], reduction="add"),
            shape=(3, 4), i=np.array([[1]]), update=np.ones((1, 4), np.float32),
        ),
    ],
    "axes": [
        graph(*AXES, node("ReduceMean", ["x", "axes"], ["y"]), **ONE),
        graph(*AXES, node("Unsqueeze", ["x", "axes"], ["y"]), **ONE),
        graph(*AXES, node("Slice", ["x", "one", "two", "axes"], ["y"]), two=np.array([2]), **ONE),
        graph(*AXES, node("CumSum", ["x", "axes"], ["y"]), **ONE),
        graph(*AXES, node("Pad", ["x", "two", "", "axes"], ["y"]), two=np.array([2, 2]), **ONE),
    ],
    "zero point": [pair(zero=np.int8(-5)), pair(zero=np.uint8(128))],
    "scale": [pair(scale=np.float32(0)), pair(scale=np.float32(-1))],
    "constant": [
        graph(
            node("Cast", ["x"], ["i"], to=TensorProto.INT64), node("Gather", ["table", "i"], ["y"]),
            table=np.zeros(256, np.int8),
        ),
    ],
}  # fmt: skip
# Rejected by what NVIDIA documents for the releases on the boards; the compiler at hand is more lenient.
BY_DOCUMENT = {
    "resize": [
        graph(node("Resize", ["x", "", "scales"], ["y"], **options), scales=np.array([1, 1, 2, 2], np.float32))
        for options in (
            {"mode": "cubic"}, {"antialias": 1}, {"keep_aspect_ratio_policy": "not_larger"},
            {"coordinate_transformation_mode": "tf_crop_and_resize"},
        )
    ],
    "normalization": [
        graph(node("LayerNormalization", ["x", "w"], ["y", "mean"]), w=np.ones(8, np.float32)),
    ],
    "onehot": [
        graph(
            *AXES, node("OneHot", ["i", "axes", "two"], ["y"]), i=np.array([1]), two=np.array([0, 1], np.float32), **ONE
        ),
    ],
    "uint8": [pair(zero=np.uint8(0)), pair(zero=None)],
    "topk": [
        graph(*AXES, node("TopK", ["x", "axes"], ["y", "i"], axis=1), **ONE),
        graph(node("TopK", ["x", "k"], ["y", "i"], axis=1, sorted=0), k=np.array([2])),
    ],
    "constant": [
        graph(
            node("ReduceMax", ["x"], ["scale"], keepdims=0), node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            node("DequantizeLinear", ["q", "scale", "zero"], ["y"], "end"), zero=np.int8(0),
        ),
    ],
}  # fmt: skip
ACCEPTED = {
    "open batch": graph(node("Relu", ["x"], ["y"]), shape=("batch", 4, 8, 8)),
    "pair": pair(),
    "pool": graph(node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[1, 1])),
    "topk": graph(node("TopK", ["x", "k"], ["y", "i"], axis=1), shape=(1, 5000), k=np.array([3000])),
    "resize": graph(
        node("Resize", ["x", "", "scales"], ["y"], mode="linear"), scales=np.array([1, 1, 2, 2], np.float32)
    ),
    "cast": graph(*cast_to(TensorProto.INT32)),
    "gelu": graph(node("Gelu", ["x"], ["y"])),
    "four bits": weights_of(ml_dtypes.int4),
    "own function": graph(
        node("Twice", ["x"], ["y"], domain="my.ops"),
        functions=[
            helper.make_function(
                "my.ops", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 20)]
            )
        ],
    ),
}


def cases(table):
    return [
        pytest.param(rule, model, id=f"{rule}-{at}")
        for rule, models in table.items()
        for at, model in enumerate(models)
    ]


@pytest.mark.parametrize(("rule", "model"), [*cases(REJECTED), *cases(BY_DOCUMENT)])
def test_what_breaks_a_rule_is_found(rule, model):
    found = lint(model, NEWEST)
    assert rule in {finding.rule for finding in found if finding.effect == "rejected"}
    assert all(finding.node and finding.reason and finding.fix for finding in found)


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_breaks_none_has_no_finding(name):
    # Four bits are unpacked: the product is computed in float.
    assert {finding.effect for finding in lint(ACCEPTED[name], NEWEST)} == ({"slow"} if name == "four bits" else set())


@pytest.mark.skipif(bool(compiler.missing()), reason=f"extra trt-check: {compiler.missing()}")
@pytest.mark.parametrize(("rule", "model"), cases(REJECTED))
def test_the_compiler_refuses_it_too(tmp_path, rule, model):
    onnx.save(model, tmp_path / "model.onnx")
    assert compiler.compiled(tmp_path / "model.onnx", tmp_path / "log").refused


@pytest.mark.skipif(bool(compiler.missing()), reason=f"extra trt-check: {compiler.missing()}")
@pytest.mark.parametrize("name", ACCEPTED)
def test_the_compiler_accepts_it_too(tmp_path, name):
    onnx.save(ACCEPTED[name], tmp_path / "model.onnx")
    assert compiler.compiled(tmp_path / "model.onnx", tmp_path / "log").refused == ()


@pytest.mark.parametrize(
    ("version", "opset"),
    [("8.2.1", 13), ("8.5.2", 17), ("8.6", 17), ("10.3.0.30", 20), ("10.13.3.9", 20), ("10.16", 24)],
)
def test_the_opset_is_capped_by_the_release(version, opset):
    assert release_of(version).opset == opset
    assert [f.rule for f in lint(graph(node("Relu", ["x"], ["y"]), opset=opset), version)] == []
    (finding,) = lint(graph(node("Relu", ["x"], ["y"]), opset=opset + 1), version)
    assert str(finding) == (
        f"model: the model is of opset {opset + 1}; TensorRT {version} reads up to {opset}; "
        f"export with opset {opset} or lower"
    )


@pytest.mark.parametrize(
    ("operator", "last_without", "first_with"),
    [
        ("HardSwish", "8.2.1", "8.4"), ("LayerNormalization", "8.5.2", "8.6.2"), ("GroupNormalization", "8.5", "8.6"),
        ("Gelu", "8.6.2", "10.3"), ("Mish", "8.6", "10.0"), ("Attention", "10.13", "10.16.2"), ("Trilu", "8.4", "8.5"),
    ],
)  # fmt: skip
def test_operators_come_with_releases(operator, last_without, first_with):
    model = graph(node(operator, ["x"], ["y"]), opset=13)
    assert lint(model, first_with) == []
    (finding,) = lint(model, last_without)
    assert finding.rule == "operator"
    assert finding.reason.endswith(f"on, not by {last_without}")


@pytest.mark.parametrize(
    ("rule", "broken", "last_with", "first_without"),
    [
        ("einsum", node("Einsum", ["x"], ["y"], equation="...ij->...ji"), "8.6.2", "10.3"),
        ("einsum", node("Einsum", ["x"], ["y"], equation="bcii->bci"), "8.6.2", "10.3"),
        ("weights", node("Conv", ["x", "x"], ["y"]), "8.4.1", "8.5.2"),
        ("limits", node("NonMaxSuppression", ["x", "x", "x"], ["y"]), "8.2.1", "8.5.2"),
    ],
)
def test_restrictions_go_with_releases(rule, broken, last_with, first_without):
    model = graph(broken, opset=13)
    (finding,) = lint(model, last_with)
    assert (finding.rule, finding.node) == (rule, "it")
    assert lint(model, first_without) == []


def test_four_bits_come_with_a_release():
    rejected = [finding for finding in lint(weights_of(ml_dtypes.int4), "8.6.2") if finding.rule == "type"]
    assert [finding.reason for finding in rejected] == ["its codes are INT4, taken from TensorRT 10.0 on"]


def test_rounded_weights_are_constant():
    model = graph(
        node("QuantizeLinear", ["w", "s"], ["q"]), node("DequantizeLinear", ["q", "s"], ["d"]),
        node("Conv", ["x", "d"], ["y"]), opset=13, w=np.ones((2, 4, 1, 1), np.float32), s=np.float32(1),
    )  # fmt: skip
    assert "weights" not in {finding.rule for finding in lint(model, "8.2.1")}


@pytest.mark.parametrize(
    ("version", "precision", "shape", "rules"),
    [
        ("10.3.0", "fp16", IMAGE, []),
        ("10.3.0", "fp32", IMAGE, ["dla precision"]),
        ("8.5.2", "int8", IMAGE, ["dla rounding"]),
        ("11.4.1", "int8", IMAGE, []),
        ("10.13.3", "fp16", ("batch", 4, 8, 8), ["dla release", "dla shape"]),
    ],
)
def test_what_an_accelerator_leaves_to_the_gpu(version, precision, shape, rules):
    found = lint_for_dla(graph(node("Relu", ["x"], ["y"]), shape=shape), version, precision)
    assert [finding.rule for finding in found] == rules
    assert all(finding.effect == "slow" and "the GPU computes it" in finding.reason for finding in found)


def test_what_is_one_operator_later_is_written_in_parts():
    (finding,) = lint(graph(node("LayerNormalization", ["x", "x"], ["y"]), opset=17), "8.5.2")
    assert str(finding) == (
        "it: LayerNormalization is taken from TensorRT 8.6 on, not by 8.5.2; write it as ReduceMean, Sub, Mul and Sqrt"
    )


def test_the_table_grows_with_the_releases():
    versions = [release.version for release in releases()]
    assert versions == sorted(versions)
    for older, newer in zip(releases(), releases()[1:], strict=False):
        assert older.operators <= newer.operators and older.opset <= newer.opset
    assert {"Conv", "Relu", "Gemm", "QuantizeLinear"} <= releases()[0].operators


def test_a_release_before_the_table_is_taken_for_its_first():
    assert release_of("8.0.1").name == "8.2"
