from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_models import images, residual_model

from edgekd.quantize import ptq, rules
from edgekd.quantize.dialects import with_rounded_branches


@pytest.fixture
def accepted(residual, tmp_path) -> onnx.ModelProto:
    """A graph with no finding, for each test to spoil."""
    ptq.quantize(residual, tmp_path / "int8.onnx", images(40))
    model = onnx.load(tmp_path / "int8.onnx")
    assert rules.check(model) == []
    return model


def node(model, name):
    return next(node for node in model.graph.node if node.name == name)


def constant(model, name, values):
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(values, name))
            return
    model.graph.initializer.append(numpy_helper.from_array(values, name))


def found(model):
    return [(finding.node, finding.rule, finding.effect) for finding in rules.check(model)]


def test_a_zero_point_other_than_0_is_rejected(accepted):
    constant(accepted, "five", np.array(5, np.int8))
    node(accepted, "b_QuantizeLinear").input[2] = "five"
    (finding,) = rules.check(accepted)
    assert str(finding) == "b_QuantizeLinear: its zero point is 5; use symmetric ranges: zero point 0"


def test_unsigned_codes_are_rejected(accepted):
    constant(accepted, "unsigned", np.array(0, np.uint8))
    node(accepted, "b_QuantizeLinear").input[2] = "unsigned"
    assert found(accepted) == [("b_QuantizeLinear", "uint8", "rejected")]


def test_a_quantized_bias_is_rejected(accepted):
    constant(accepted, "codes", np.ones(4, np.int32))
    constant(accepted, "one", np.float32(1))
    accepted.graph.node.insert(0, helper.make_node("DequantizeLinear", ["codes", "one"], ["bias"], "bias_dq"))
    node(accepted, "stem").input[2] = "bias"
    (finding,) = rules.check(accepted)
    assert str(finding) == "bias_dq: it dequantizes INT32, as a bias; keep biases in float"


@pytest.mark.parametrize("operator", ["QLinearConv", "ConvInteger", "QLinearAdd", "DynamicQuantizeLinear", "QGemm"])
def test_integer_operators_are_rejected(accepted, operator):
    accepted.graph.node.append(helper.make_node(operator, ["images"], ["integer"], "integer"))
    assert found(accepted) == [("integer", "operator", "rejected")]


def test_pairs_of_another_domain_are_rejected(accepted):
    node(accepted, "b_QuantizeLinear").domain = "com.microsoft"
    assert found(accepted) == [("b_QuantizeLinear", "operator", "rejected")]


def test_an_activation_with_a_scale_per_channel_runs_in_float(accepted):
    constant(accepted, "b_scale", np.full(4, 0.1, np.float32))
    assert found(accepted) == [("b_QuantizeLinear", "per channel", "slow")]


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
def test_a_scale_that_is_not_positive_is_rejected(accepted, scale):
    constant(accepted, "b_scale", np.float32(scale))
    assert found(accepted) == [(f"b_{operator}", "scale", "rejected") for operator in rules.PAIR]


def test_a_scale_that_is_not_constant_is_rejected(accepted):
    accepted.graph.node.insert(0, helper.make_node("ReduceMax", ["images"], ["largest"], keepdims=0))
    node(accepted, "b_QuantizeLinear").input[1] = "largest"
    assert found(accepted) == [("b_QuantizeLinear", "constant", "rejected")]


def test_an_int8_constant_stands_before_a_dequantizer_only(accepted):
    constant(accepted, "table", np.zeros(256, np.int8))
    accepted.graph.node.append(helper.make_node("Gather", ["table", "shape"], ["looked_up"], "lookup"))
    assert found(accepted) == [("lookup", "constant", "rejected")]


def test_a_pair_inside_an_lma_is_slow(accepted):
    pair = [
        helper.make_node("QuantizeLinear", ["line", "b_scale", "zero_point_int8"], ["q"], "inner"),
        helper.make_node("DequantizeLinear", ["q", "b_scale", "zero_point_int8"], ["dq"], "inner_dq"),
    ]
    at = list(accepted.graph.node).index(node(accepted, "lma_sum"))
    for step, made in enumerate(pair):
        accepted.graph.node.insert(at + step, made)
    node(accepted, "lma_sum").input[0] = "dq"
    (finding,) = rules.check(accepted)
    assert (finding.node, finding.rule) == ("inner", "inside LMA")
    assert "inside the activation act" in finding.reason


def test_a_rounded_branch_is_slow(accepted):
    findings = rules.check(with_rounded_branches(accepted))
    assert [(finding.node, finding.rule, finding.effect) for finding in findings] == [("add", "branch", "slow")]


def test_a_layer_of_which_only_the_weights_are_rounded_runs_in_float(accepted):
    node(accepted, "conv1").input[0] = "b"
    assert found(accepted) == [("conv1", "input", "slow")]


def test_weights_scaled_along_another_axis_are_slow(accepted):
    for operator in rules.PAIR:
        node(accepted, f"conv2.weight_{operator}").attribute[0].i = 1
    assert found(accepted) == [("conv2", "axis", "slow")]


def test_scales_per_channel_need_opset_13(accepted):
    accepted.opset_import[0].version = 12
    assert {finding.rule for finding in rules.check(accepted)} == {"opset"}


def test_a_float_model_has_no_finding():
    assert rules.check(residual_model()) == []
