"""fp16 in the graph: what is half, what stays float and why, and what it costs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper
from plain_networks import PLAIN_NETWORKS
from small_models import images, residual_model, run
from test_quantize_dialects import SHAPE, exported

from edgekd import registry
from edgekd.errors import RecipeError
from edgekd.quantize import half, ptq
from edgekd.quantize.graph import Graph, lma_name
from edgekd.quantize.quantizers import Samples
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification

LAYERS = ["stem", "conv1", "conv2", "fc"]


def scaled(file, **factors):
    """`residual_model` with the weights of some layers multiplied."""
    model = residual_model()
    for tensor in model.graph.initializer:
        if tensor.name.removesuffix(".weight") in factors and tensor.name.endswith(".weight"):
            values = numpy_helper.to_array(tensor) * np.float32(factors[tensor.name.removesuffix(".weight")])
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, file)
    return file


def converted(file, **options):
    facts = half.quantize(file, file.with_name("half.onnx"), images(40), **options)
    return facts, onnx.load(file.with_name("half.onnx"))


def kinds(model):
    return {tensor.name: numpy_helper.to_array(tensor).dtype for tensor in model.graph.initializer}


def test_weights_are_half_images_and_logits_are_not(residual):
    facts, model = converted(residual)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(residual).graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            expected = weights[tensor.name.removesuffix("_fp16")].astype(np.float16)
            assert np.array_equal(numpy_helper.to_array(tensor), expected)
    assert {f"{name}.{part}_fp16" for name in LAYERS for part in ("weight", "bias")} <= set(kinds(model))
    types = [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]
    assert types == [TensorProto.FLOAT] * 2
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    assert facts["layers"] == LAYERS and facts["still_float"] == ["act"] and facts["warnings"] == []
    assert facts["casts"] == 4  # behind the images, around the LMA, in front of the logits
    assert facts["size_bytes"] < 0.75 * residual.stat().st_size  # of this model, names are the greater part


@pytest.mark.parametrize("optimize", [False, True])
def test_it_computes_what_the_float_model_computes_but_for_11_bits(residual, optimize):
    _, model = converted(residual)
    x = images(16, 1)
    assert ptq.sqnr_db(run(onnx.load(residual), x), run(model, x, optimize=optimize)) > 55


def test_an_lma_is_float_as_a_whole(residual):
    _, model = converted(residual)
    inside = [node for node in model.graph.node if lma_name(node)]
    assert len(inside) == 5
    assert not [name for node in inside for name in (*node.input, *node.output) if name.endswith("_fp16")]
    assert [region.name for region in Graph(model).lma] == ["act"]


def test_a_range_that_fp16_does_not_have_stays_in_float(tmp_path):
    file = scaled(tmp_path / "large.onnx", conv1=1e5, conv2=1e-5)
    facts, model = converted(file)
    assert facts["still_float"] == ["conv1", "conv2", "act"]
    conv1, conv2 = facts["warnings"]
    assert conv1.startswith("conv1 stays in float: its constant conv1.weight reaches ")
    assert conv2.startswith("conv2 stays in float: its input reaches ")
    assert conv2.endswith(" on the calibration images, fp16 ends at 65504")
    x = images(16, 1)
    found = run(model, x)
    assert np.isfinite(found).all() and ptq.sqnr_db(run(onnx.load(file), x), found) > 55


def test_an_output_beyond_the_range_is_told_once_where_it_is_made(tmp_path):
    file = scaled(tmp_path / "large.onnx", conv1=30, conv2=3e4, fc=1e-4)
    facts, model = converted(file)
    told = [sentence.partition(":")[0] for sentence in facts["warnings"]]
    assert told == ["conv2 stays in float", "fc stays in float"]  # not the Add, ReLU and MaxPool between them
    assert "its output reaches " in facts["warnings"][0] and "its input reaches " in facts["warnings"][1]
    assert facts["still_float"] == ["conv2", "fc", "act"]
    x = images(16, 1)
    assert ptq.sqnr_db(run(onnx.load(file), x), run(model, x)) > 55


def test_weights_that_would_vanish_stay_in_float(tmp_path):
    facts, model = converted(scaled(tmp_path / "small.onnx", conv2=1e-9))
    assert facts["still_float"] == ["conv2", "act"]
    assert facts["warnings"] == [
        "conv2 stays in float: its constant conv2.weight is too small for fp16, which would keep 0 dB of it"
    ]
    assert kinds(model)["conv2.weight"] == np.float32


def test_layers_are_kept_by_name(residual):
    facts, model = converted(residual, keep_float=["fc"])
    assert facts["keep_float"] == ["fc"] and facts["still_float"] == ["fc", "act"] and facts["warnings"] == []
    assert kinds(model)["fc.weight"] == np.float32 and "fc.weight_fp16" not in kinds(model)
    assert facts["casts"] == 4  # the one in front of fc replaces that in front of the logits


def test_an_unknown_layer(residual):
    with pytest.raises(RecipeError) as caught:
        converted(residual, keep_float=["conv3"])
    assert str(caught.value).splitlines() == [
        'error: quantize.keep_float = "conv3" is not a known layer of the model',
        '       known: conv1, conv2, fc, stem   (closest: "conv2")',
        'fix:   set quantize.keep_float = "conv2"',
    ]


def test_an_operator_without_fp16_stays_in_float(tmp_path):
    """Resize takes its factors in float32 only; Cast and ConstantOfShape say in an attribute what they make."""
    text = """<ir_version: 10, opset_import: ["": 20]>
    g (float[N, 3, 12, 12] images) => (float[N, 4, 24, 24] logits)
    <float[4] scales = {1, 1, 2, 2}, float[4, 3, 1, 1] weight = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> {
        large = Resize (images, , scales)
        made = Conv (large, weight)
        shape = Shape (made)
        ones = ConstantOfShape <value = float[1] {1.0}> (shape)
        doubled = Mul (made, ones)
        logits = Relu (doubled)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "resize.onnx")
    facts, model = converted(tmp_path / "resize.onnx")
    read = {node.op_type: list(node.input) for node in model.graph.node}
    assert read["Resize"] == ["images", "", "scales"] and read["Conv"] == ["large_fp16", "weight_fp16"]
    assert read["Mul"] == ["made_fp16", "ones_fp16"]
    x = images(2, 1)
    assert ptq.sqnr_db(run(onnx.load(tmp_path / "resize.onnx"), x), run(model, x)) > 55
    assert facts["layers"] == ["weight"] and facts["still_float"] == []


def test_the_account_is_that_of_int8(residual):
    _, model = converted(residual)
    graph, x = Graph(onnx.load(residual)), images(8, 1)
    rows = half.layers(graph, model, x)
    assert [row["layer"] for row in rows] == LAYERS and all(row["quantized"] for row in rows)
    for layer, row in zip(graph.layers, rows, strict=True):
        exact, rounded = layer.weight.astype(np.float64), layer.weight.astype(np.float16).astype(np.float64)
        noise = np.square(exact - rounded).sum()
        assert row["weights_sqnr_db"] == pytest.approx(10 * np.log10(np.square(exact).sum() / noise))
        assert row["weights_sqnr_db"] > 70 and row["output_sqnr_db"] > 55 and row["output_cosine"] > 0.99999
        assert row["input_sqnr_db"] is None and row["suggestion"] == ""
    relu = run(onnx.load(residual), x, "b")
    assert rows[0]["output_sqnr_db"] == pytest.approx(ptq.sqnr_db(relu, run(half.in_float(model), x, "b")), abs=1)


def test_what_a_recipe_names(residual, tmp_path):
    quantizer = registry.create("quantizer", "fp16", options={"keep_float": ["stem"]})
    labels = np.zeros(4, np.int64)
    samples = Samples(images(40), images(4), Judge(Classification(), labels, (10,)))
    facts = quantizer.write(residual, tmp_path / "out.onnx", samples)
    assert quantizer.precision == "fp16" and not quantizer.trains
    assert (
        facts["still_float"] == ["stem", "act"]
        and facts["account"]["still_float"] == ["stem"]
        and facts["images"] == 40
    )
    assert [row["quantized"] for row in facts["account"]["layers"]] == [False, True, True, True]
    assert len(run(onnx.load(tmp_path / "out.onnx"), images(4))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "lma continuous"])
@pytest.mark.parametrize("name", PLAIN_NETWORKS)
def test_the_zoo(tmp_path, name, activation):
    exported(tmp_path / "float.onnx", name, activation)
    facts, model = converted(tmp_path / "float.onnx")
    x = images(16, 1, (SHAPE.channels, SHAPE.height, SHAPE.width))
    expected, found = run(onnx.load(tmp_path / "float.onnx"), x), run(model, x, optimize=True)
    assert ptq.sqnr_db(expected, found) > 40
    assert facts["warnings"] == [] and set(facts["still_float"]) == set(facts["lma"])
    assert facts["size_bytes"] < 0.8 * (tmp_path / "float.onnx").stat().st_size
