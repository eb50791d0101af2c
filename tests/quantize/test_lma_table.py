"""LMA as a table: for every code, to the last bit, what the float form and the rounding behind it make."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_models import images, run
from torch import nn

from edgekd import activations, export
from edgekd.activations import LMA
from edgekd.quantize import dialects, ptq, rules, table
from edgekd.quantize.graph import Graph

KS = (2, 4, 6, 8, 12, 16)
STYLES = ("gather", "elements")
SCALE = 2.0**-4
CHANNELS = 4  # for each layer
IMAGE = (CHANNELS * len(KS), 4, 4)


class AllSizes(nn.Module):
    """An LMA of each k on channels of its own, with jumps or without; all cuts lie exactly at codes of SCALE."""

    def __init__(self, continuous):
        super().__init__()
        self.layers = nn.ModuleList(LMA(k=k, momentum=0.99, continuous=continuous) for k in KS)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in self.layers:
                layer.slope_deltas.normal_(0, 0.5, generator=generator)
                layer.biases.normal_(0, 0.5, generator=generator)
                layer.running.copy_(torch.tensor([2.0, layer.k * 5 / 6]) * SCALE)  # 6 sigma / k: cuts 5 codes apart
        self.eval()

    def forward(self, x):
        parts = x.split(CHANNELS, 1)
        return torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)], 1)


@functools.cache
def exported(form):
    """The layers in one form, as plain ONNX."""
    network = AllSizes(activations.FORMS[form].exact_for == "continuous")
    with tempfile.TemporaryDirectory() as folder:
        export.export(
            network, Path(folder, "lma.onnx"), example=np.zeros((1, *IMAGE), np.float32), opset=20, form=form,
            dynamic_batch=True, metadata={},
        )  # fmt: skip
        return network, onnx.load(Path(folder, "lma.onnx"))


def between_codes(form, code):
    """The layers between codes: a pair in front of each one, another of half the scale behind it.

    With it, for each layer: itself, the tensor in front of it, the tensor behind it.
    """
    network, plain = exported(form)
    model, regions = copy.deepcopy(plain), Graph(plain).lma
    assert [region.name for region in regions] == [f"layers.{at}" for at in range(len(KS))]
    zero = np.array(0 if code == np.int8 else 128, code)
    for name, value in (("zero", zero), ("in_scale", np.float32(SCALE)), ("out_scale", np.float32(SCALE / 2))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    scales = {region.input: "in_scale" for region in regions} | {region.output: "out_scale" for region in regions}
    nodes = []
    for node in copy.deepcopy(list(plain.graph.node)):
        node.input[:] = [f"{name}_rounded" if name in scales else name for name in node.input]
        nodes.append(node)
        for name in node.output:
            if name in scales:
                constants = [scales[name], "zero"]
                nodes.append(helper.make_node("QuantizeLinear", [name, *constants], [f"{name}_codes"]))
                nodes.append(helper.make_node("DequantizeLinear", [f"{name}_codes", *constants], [f"{name}_rounded"]))
    del model.graph.node[:]
    del model.graph.value_info[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    around = [(region.input + "_rounded", region.output) for region in regions]
    return model, [(layer, *tensors) for layer, tensors in zip(network.layers, around, strict=True)]


def all_codes():
    """Images that are rounded to every code in each layer, and to the ends of the range from beyond it."""
    values = np.resize(np.arange(-129, 129), (5, CHANNELS, *IMAGE[1:])) * SCALE
    return np.tile(values, (1, len(KS), 1, 1)).astype(np.float32)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("code", [np.int8, np.uint8])
@pytest.mark.parametrize("form", [
    pytest.param(form, marks=[] if form in ("step_gemm", "max_gemm") else [pytest.mark.slow])
    for form in activations.FORMS
])  # fmt: skip
def test_all_256_codes_are_exactly_those_of_the_float_form(form, code, style):
    model, layers = between_codes(form, code)
    tabled, x = table.with_tables(model, style), all_codes()
    onnx.checker.check_model(tabled, full_check=True)
    assert len(table.tables(tabled)) == len(KS) and table.tables(model) == []
    assert np.array_equal(run(tabled, x), run(model, x))
    for layer, before, behind in layers:
        cuts = layer.segments().cuts.double().numpy() / SCALE
        assert np.array_equal(cuts, np.rint(cuts)) and np.abs(cuts).max() < 128  # each cut is a code
        values = run(model, x, before)
        assert len(np.unique(values)) == 256
        if style == "gather":
            found = run(tabled, x, behind)
            assert np.array_equal(found, run(model, x, behind))
            with torch.no_grad():  # and both are what the layer itself says of these codes
                assert np.allclose(found, layer(torch.from_numpy(values)).numpy(), rtol=1e-5, atol=1e-5)


def test_a_table_of_codes_replaces_the_rounding_and_a_float_one_leaves_it():
    model, [(_, _, tensor), *_] = between_codes("step_gemm", np.uint8)
    codes, floats = (Graph(table.with_tables(model, style)) for style in ("elements", "gather"))
    assert codes.constants[f"{tensor}_codes_table"].dtype == np.uint8
    assert codes.constants[f"{tensor}_codes_table"].shape == (256,)
    assert floats.constants[f"{tensor}_table"].dtype == np.float32
    count = [Counter(node.op_type for node in graph.model.graph.node) for graph in (codes, floats)]
    n = len(KS)
    assert [each["QuantizeLinear"] for each in count] == [n, 2 * n]
    assert [each["GatherElements"] for each in count] == [n, 0] and [each["Gather"] for each in count] == [0, n]
    assert [each["Gemm"] for each in count] == [0, 0]


def test_shapes_that_are_fixed_and_smaller_than_the_table():
    model, _ = between_codes("step_gemm", np.int8)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    x = all_codes()[:1]
    for style in STYLES:
        tabled = table.with_tables(model, style)
        assert len(table.tables(tabled)) == len(KS)
        assert np.array_equal(run(tabled, x), run(model, x))


def test_a_layer_whose_output_is_also_read_in_float_keeps_a_float_table():
    model, [(_, _, tensor), *_] = between_codes("step_gemm", np.int8)
    model.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    tabled, x = table.with_tables(model, "elements"), all_codes()
    assert Graph(tabled).constants[f"{tensor}_table"].dtype == np.float32
    for name in (tensor, "logits"):
        assert np.array_equal(run(tabled, x, name), run(model, x, name))


def test_whole_models_compute_the_same_in_both_dialects(residual):
    int8 = ptq.prepare(residual, images(40)).quantized("minmax", 100)
    x = images(16, 1)
    floats = table.with_tables(int8, "gather")
    assert table.tables(floats) == ["act"] and rules.check(floats) == []  # TensorRT takes it
    assert np.array_equal(run(floats, x), run(int8, x))
    for activations_as in ("uint8", "int8"):
        deployed = dialects.onnxruntime_from_int8(int8, activations=activations_as)
        tabled = table.with_tables(deployed, "elements")
        assert table.tables(tabled) == ["act"]
        assert np.array_equal(run(tabled, x), run(deployed, x))
        assert np.array_equal(run(tabled, x, optimize=True), run(deployed, x, optimize=True))


def test_what_reads_no_codes_is_left_alone(residual):
    prepared = ptq.prepare(residual, images(40))
    for model in (prepared.graph.model, prepared.quantized("minmax", 100, ["act"])):
        same = table.with_tables(model, "elements")
        assert table.tables(same) == []
        assert [node.name for node in same.graph.node] == [node.name for node in model.graph.node]
