from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import CLASSES, SHAPE, images, residual_model, rounded, run

from edgekd.errors import DataError, RecipeError
from edgekd.quantize import ptq, rules
from edgekd.quantize.graph import Graph
from edgekd.quantize.placement import DEQUANTIZED, pairs
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification


def quantized(file, out, **options):
    facts = ptq.quantize(file, out, images(40), **options)
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    return facts, model


def test_pairs_stand_where_tensorrt_wants_them(residual, tmp_path):
    facts, model = quantized(residual, tmp_path / "out.onnx")
    assert rules.check(model) == []
    graph = Graph(model)
    reads = {node.name: list(node.input) for node in model.graph.node}
    assert facts["pairs"] == 6
    assert set(facts["scales"]) == {"images", "b", "c", "d", "g", "i"}
    assert reads["conv1"] == ["b_dequantized", "conv1.weight_dequantized", "conv1.bias"]  # the bias stays in float
    assert reads["add"] == ["e", "b_dequantized"]  # the skip alone, by the pair that conv1 reads too
    assert reads["relu_1"] == ["a"]  # no pair between a layer and its ReLU
    assert reads["lma_line"][0] == reads["lma_above"][0] == "c_dequantized"
    assert reads["lma_sum"] == ["line", "scaled"]
    assert reads["pool"] == ["g_dequantized"]
    assert facts["scales"]["i"] == facts["scales"]["g"]  # one scale on both sides of what moves values
    assert "logits_dequantized" not in graph.makers


def test_weights_are_rounded_per_output_channel_and_activations_per_tensor(residual, tmp_path):
    facts, model = quantized(residual, tmp_path / "out.onnx")
    graph, x = Graph(model), images(8, 1)
    for name in ("stem", "conv1", "conv2", "fc"):
        weight = graph.constants[f"{name}.weight"]
        scale = np.abs(weight).reshape(len(weight), -1).max(1) / np.float32(127)
        expected = rounded(weight, scale.reshape(-1, *[1] * (weight.ndim - 1)))
        assert run(model, x, f"{name}.weight{DEQUANTIZED}") == pytest.approx(expected, abs=1e-6)
    for tensor, scale in facts["scales"].items():
        expected = rounded(x if tensor == "images" else run(model, x, tensor), scale)
        assert np.array_equal(run(model, x, tensor + DEQUANTIZED), expected)


def plain_model() -> onnx.ModelProto:
    """conv -> ReLU -> conv -> ReLU -> fc: no residual, no LMA, nothing that quantize_static must not round."""
    rng = np.random.default_rng(3)
    shapes = {"one": (4, 3, 3, 3), "two": (6, 4, 3, 3), "fc": (CLASSES, 6 * 144)}
    constants = [
        numpy_helper.from_array((rng.standard_normal(shape) / 4).astype(np.float32), f"{name}.weight")
        for name, shape in shapes.items()
    ]
    constants += [numpy_helper.from_array(np.ones(shape[0], np.float32), f"{n}.bias") for n, shape in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["images", "one.weight", "one.bias"], ["a"], "one", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu_1"),
        helper.make_node("Conv", ["b", "two.weight", "two.bias"], ["c"], "two", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"], "relu_2"),
        helper.make_node("Flatten", ["d"], ["e"], "flatten"),
        helper.make_node("Gemm", ["e", "fc.weight", "fc.bias"], ["logits"], "fc", transB=1),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])
        for name, shape in (("images", SHAPE), ("logits", [CLASSES]))
    ]
    graph = helper.make_graph(nodes, "plain", [values[0]], [values[1]], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.filterwarnings("ignore")
def test_on_a_plain_network_it_computes_what_quantize_static_does(tmp_path, capfd):
    from onnxruntime.quantization import QuantType, quantize_static

    onnx.save(plain_model(), tmp_path / "plain.onnx")
    _, ours = quantized(tmp_path / "plain.onnx", tmp_path / "ours.onnx")
    batches = iter([{"images": images(40)}])

    class Reader:
        def get_next(self):
            return next(batches, None)

    quantize_static(
        tmp_path / "plain.onnx", tmp_path / "theirs.onnx", Reader(), per_channel=True, activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8, op_types_to_quantize=["Conv", "Gemm"],
        extra_options={
            "ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "AddQDQPairToWeight": True,
            "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm"],
        },
    )  # fmt: skip
    theirs, x = onnx.load(tmp_path / "theirs.onnx"), images(16, 5)
    assert run(ours, x) == pytest.approx(run(theirs, x), abs=0.02)
    assert np.abs(run(ours, x) - run(plain_model(), x)).max() > 0.02  # both are as far from float


def test_layers_named_are_kept_in_float(residual, tmp_path):
    assert ptq.layer_names(residual) == ["stem", "conv1", "conv2", "fc", "act"]
    facts, model = quantized(residual, tmp_path / "out.onnx", keep_float=["conv2", "act"])
    assert facts["keep_float"] == ["act", "conv2"]
    reads = {node.name: list(node.input) for node in model.graph.node}
    assert reads["conv2"] == ["d", "conv2.weight", "conv2.bias"]
    assert reads["lma_line"][0] == "c"
    assert reads["add"] == ["e", "b"]  # the addition belongs to the layer of its branch
    assert reads["conv1"][0] == "b_dequantized"
    assert rules.check(model) == []


def test_all_layers_in_float_is_the_float_model(residual):
    graph = Graph(residual_model())
    assert pairs(graph, ["stem", "conv1", "conv2", "fc"]) == {}


def test_without_marks_the_products_of_an_lma_are_still_no_layers(tmp_path):
    model = residual_model(marked=False)
    model.graph.node.insert(5, helper.make_node("Gemm", ["one", "wide"], ["unused"], "lma_gemm"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 3), np.float32), "one"))
    model.graph.node.insert(5, helper.make_node("Reshape", ["line", "rows"], ["wide"], "lma_rows"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([3, -1]), "rows"))
    assert [layer.name for layer in Graph(model).layers] == ["stem", "conv1", "conv2", "fc"]


def test_the_result_is_the_same_bytes_every_time(residual, tmp_path):
    for method in ptq.METHODS:
        files = [tmp_path / f"{method}{index}.onnx" for index in range(2)]
        for file in files:
            ptq.quantize(residual, file, images(40), calibrate=method)
        assert files[0].read_bytes() == files[1].read_bytes()


def test_choose_takes_the_best_on_the_validation_set(residual):
    prepared = ptq.prepare(residual, images(40))
    x = images(60, 9)
    labels = run(residual_model(), x).argmax(1)
    seen = []
    judge = Judge(Classification(), labels, (4,))
    found = ptq.choose(prepared, x, judge, on_progress=lambda share, text: seen.append((share, text)))
    assert [row["method"] for row in found["tried"]] == ["minmax", "entropy", "percentile", "percentile"]
    assert found["float_score"] == 1
    assert found["score"] == max(row["score"] for row in found["tried"])
    equals = [row for row in found["tried"] if row["score"] == found["score"]]
    best = max(equals, key=lambda row: row["logits_sqnr_db"])
    assert (found["method"], found["percentile"]) == (best["method"], best["percentile"])
    assert [text for _, text in seen] == [
        "trying minmax", "trying entropy", "trying percentile 99.99", "trying percentile 99.9",
    ]  # fmt: skip


def refused(error, action):
    with pytest.raises(error) as caught:
        action()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("error: ")
    assert lines[-1].startswith("fix:   ")
    return str(caught.value)


def test_unknown_layers_and_methods_name_the_known_ones(residual, tmp_path):
    out = tmp_path / "out.onnx"
    text = refused(RecipeError, lambda: ptq.quantize(residual, out, images(40), keep_float=["conv3"]))
    assert 'quantize.keep_float = "conv3" is not a known layer of the model' in text
    assert "known: act, conv1, conv2, fc, stem" in text
    text = refused(RecipeError, lambda: ptq.quantize(residual, out, images(40), calibrate="entropie"))
    assert "known: entropy, minmax, percentile" in text
    text = refused(
        RecipeError, lambda: ptq.quantize(residual, out, images(40), calibrate="percentile", percentile=0.9999)
    )
    assert "quantize.percentile = 0.9999 would clip most of the values" in text
    assert not out.exists()


def test_models_that_cannot_be_quantized_say_why(residual, tmp_path):
    file = tmp_path / "bad.onnx"

    def text(model):
        onnx.save(model, file)
        return refused(DataError, lambda: ptq.prepare(file, images(40)))

    file.write_bytes(b"not a model")
    assert "bad.onnx is not a valid ONNX model" in refused(DataError, lambda: ptq.prepare(file, images(40)))
    foreign = residual_model()
    foreign.opset_import.append(helper.make_opsetid("com.example", 1))
    foreign.graph.node[1].domain = "com.example"
    assert "has operators of the domain com.example, which no other runtime knows" in text(foreign)
    assert "is quantized already: it has DequantizeLinear and QuantizeLinear" in text(quantized(residual, file)[1])
    unweighted = residual_model()
    del unweighted.graph.node[2:]
    unweighted.graph.node[0].CopyFrom(helper.make_node("Relu", ["images"], ["a"]))
    unweighted.graph.output[0].CopyFrom(helper.make_tensor_value_info("b", TensorProto.FLOAT, ["N", *SHAPE]))
    assert "has nothing to quantize: no Conv, ConvTranspose, Gemm or MatMul with constant weights" in text(unweighted)
    two = residual_model()
    two.graph.input.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, [1]))
    assert "the model has 2 inputs: images, extra" in text(two)


def test_an_opset_without_scales_per_channel_is_refused(tmp_path):
    onnx.save(residual_model(opset=12), tmp_path / "old.onnx")
    text = refused(DataError, lambda: ptq.prepare(tmp_path / "old.onnx", images(40)))
    assert "old.onnx is of opset 12, which has no scales per channel" in text
    assert "allowed: opset 13 or later" in text
