"""One calibration, several dialects: what must be equal is equal to the last bit, on every network of the zoo."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from plain_networks import PLAIN_NETWORKS
from small_models import images, run

from edgekd import activations, export, networks
from edgekd.activations import multi_segment_layers
from edgekd.data import Shape
from edgekd.quantize import account, dialects, ptq, rules
from edgekd.quantize.graph import Graph

# Options that make each network of the zoo small; one that is new is built with its defaults.
SMALL = {
    "resnet": {"depth": 8, "width": 0.25},
    "wrn": {"depth": 10, "k": 1, "width": 0.25},
    "mobilenet_v2": {"width": 0.25},
    "lma_student": {"size": 3, "width": 0.5},
    "lma_teacher": {"width": 0.1},
}
ACTIVATIONS = {
    "relu": ("relu", {}),
    "lma": ("lma", {"k": 4}),
    "lma continuous": ("lma", {"k": 4, "continuous": True}),
}
SHAPE = Shape(3, 12, 12)
ZOO = [
    pytest.param(name, activation, marks=[] if (name, activation) == ("resnet", "lma") else [pytest.mark.slow])
    for name in PLAIN_NETWORKS for activation in ACTIVATIONS
]  # fmt: skip


def exported(file, name, activation, form=None):
    """A network with weights as training leaves them: statistics that fit its data, segments that are no ReLU."""
    kind, options = ACTIVATIONS[activation]
    network = networks.build(name, SMALL.get(name, {}), SHAPE, 10, (kind, options), 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, layer in multi_segment_layers(network):
            layer.slope_deltas.normal_(0, 0.2)
            layer.biases.normal_(0, 0.05)
        for _ in range(3):
            network.train()(torch.randn(32, 3, 12, 12))
    form = form or activations.default_form(options.get("continuous", False))
    export.export(
        network, file, example=images(1, shape=(3, 12, 12)), opset=20, dynamic_batch=True, form=form, metadata={}
    )
    return network


@pytest.mark.parametrize(("name", "activation"), ZOO)
def test_the_zoo_follows_the_rules_and_all_dialects_compute_the_same(tmp_path, name, activation):
    network = exported(tmp_path / "float.onnx", name, activation)
    prepared = ptq.prepare(tmp_path / "float.onnx", images(40, shape=(3, 12, 12)))
    int8, x = prepared.quantized("minmax", 100), images(16, 1, (3, 12, 12))
    assert rules.check(int8) == []
    facts = prepared.facts("minmax", 100)
    lma_layers = {layer for layer, _ in multi_segment_layers(network)}
    weighted = {
        layer for layer, module in network.named_modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    }
    assert set(facts["layers"]) == weighted
    assert set(facts["lma"]) == lma_layers

    expected = run(int8, x)
    for same in (dialects.uint8_from_int8, dialects.with_integer_relu, dialects.with_stored_weights):
        assert np.array_equal(run(same(int8), x), expected), same.__name__

    deployed = dialects.onnxruntime_from_int8(int8)
    onnx.checker.check_model(deployed, full_check=True)
    arm = dialects.onnxruntime_from_int8(int8, activations="int8")
    assert np.array_equal(run(arm, x), run(deployed, x))
    assert account.still_float(prepared.graph, deployed) == []
    assert ptq.sqnr_db(run(prepared.graph.model, x), run(deployed, x, optimize=True)) > 3
    assert len(deployed.SerializeToString()) < len(prepared.graph.model.SerializeToString())


@pytest.mark.slow
@pytest.mark.parametrize("form", activations.FORMS)
def test_every_form_of_lma_is_left_whole(tmp_path, form):
    continuous = activations.FORMS[form].exact_for == "continuous"
    network = exported(tmp_path / "float.onnx", "resnet", "lma continuous" if continuous else "lma", form)
    prepared = ptq.prepare(tmp_path / "float.onnx", images(40, shape=(3, 12, 12)))
    int8 = prepared.quantized("minmax", 100)
    assert rules.check(int8) == []
    before, after = (
        {node.name: list(node.input) for node in model.graph.node} for model in (prepared.graph.model, int8)
    )
    assert len(prepared.graph.lma) == len(list(multi_segment_layers(network)))
    for region in prepared.graph.lma:
        for node in region.nodes:
            changed = [a for a, b in zip(before[node.name], after[node.name], strict=True) if a != b]
            assert set(changed) <= {region.input}


def test_uint8_codes_are_the_int8_codes_plus_128(residual, tmp_path):
    int8 = ptq.prepare(residual, images(40)).quantized("minmax", 100)
    uint8 = dialects.uint8_from_int8(int8)

    def codes(model, kind):
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        shown.graph.node.append(onnx.helper.make_node("Cast", ["b_quantized"], ["codes"], to=kind))
        return run(shown, images(4), "codes")

    assert np.array_equal(codes(uint8, onnx.TensorProto.FLOAT), codes(int8, onnx.TensorProto.FLOAT) + 128)
    kinds = {node.input[2] for node in uint8.graph.node if node.op_type in rules.PAIR and node.input[0][0] in "abcdi"}
    assert {numpy_kind(uint8, name) for name in kinds} >= {np.dtype(np.uint8)}


def numpy_kind(model, name):
    return Graph(model).constants[name].dtype


def test_onnxruntime_computes_every_layer_of_its_dialect_in_integers(residual):
    prepared = ptq.prepare(residual, images(40))
    int8 = prepared.quantized("minmax", 100)
    assert account.still_float(prepared.graph, int8) == ["stem", "conv1", "conv2", "fc"]
    assert account.still_float(prepared.graph, dialects.onnxruntime_from_int8(int8)) == []
    mixed = prepared.quantized("minmax", 100, ["conv1"])
    assert account.still_float(prepared.graph, dialects.onnxruntime_from_int8(mixed)) == ["conv1"]


def test_a_clip_that_ends_below_the_largest_code_stays_where_it_is(residual, tmp_path):
    model = onnx.load(residual)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.float32(v), n) for v, n in ((0, "zero"), (0.5, "half"))
    )
    model.graph.node[1].CopyFrom(onnx.helper.make_node("Clip", ["a", "zero", "half"], ["b"], "clip"))
    onnx.save(model, tmp_path / "clip.onnx")
    int8 = ptq.prepare(tmp_path / "clip.onnx", images(40)).quantized("minmax", 100)
    moved = dialects.with_integer_relu(int8)
    assert Counter(node.op_type for node in moved.graph.node)["Clip"] == 0
    assert np.array_equal(run(moved, images(8, 1)), run(int8, images(8, 1)))
    for tensor in int8.graph.initializer:
        if tensor.name == "b_scale":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(1), "b_scale"))
    kept = dialects.with_integer_relu(int8)
    assert Counter(node.op_type for node in kept.graph.node)["Clip"] == 1
    assert np.array_equal(run(kept, images(8, 1)), run(int8, images(8, 1)))


def test_integer_biases_are_within_half_a_unit_of_the_float_ones(residual):
    prepared = ptq.prepare(residual, images(40))
    int8 = prepared.quantized("minmax", 100)
    graph = Graph(dialects.with_integer_biases(int8))
    for node in graph.model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            bias, x, weights = (graph.makers[node.input[at]] for at in (2, 0, 1))
            unit = graph.constants[x.input[1]] * graph.constants[weights.input[1]]
            assert graph.constants[bias.input[1]] == pytest.approx(unit, rel=1e-6)
            codes, exact = graph.constants[bias.input[0]], prepared.graph.constants[f"{node.name}.bias"]
            assert codes.dtype == np.int32
            assert (np.abs(codes * unit - exact) <= 0.51 * unit).all()


def test_stored_weights_are_a_quarter_of_the_float_ones(residual):
    int8 = ptq.prepare(residual, images(40)).quantized("minmax", 100)
    stored = dialects.with_stored_weights(int8)
    sizes = Graph(stored).constants
    for name in ("stem", "conv1", "conv2", "fc"):
        assert sizes[f"{name}.weight_quantized"].dtype == np.int8
        assert f"{name}.weight" not in sizes
    assert rules.check(stored) == []
