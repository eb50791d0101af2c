from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_models import images, residual_model, rounded, run

from edgekd.quantize import account, ptq, sessions
from edgekd.quantize.placement import DEQUANTIZED
from edgekd.tasks.classification import Classification


@pytest.fixture
def prepared(residual):
    return ptq.prepare(residual, images(64))


def scales(prepared, method="minmax", percentile=100.0, keep_float=()):
    return prepared.facts(method, percentile, keep_float)["scales"]


def plain_sqnr(x, y):
    return 10 * np.log10((x.astype(float) ** 2).sum() / ((x.astype(float) - y) ** 2).sum())


def plain_cosine(x, y):
    x, y = x.astype(float).ravel(), y.astype(float).ravel()
    return x @ y / np.sqrt((x @ x) * (y @ y))


def test_each_layer_is_accounted_for_by_the_plain_formulas(prepared, monkeypatch):
    monkeypatch.setattr(sessions, "BATCH", 7)
    int8, x = prepared.quantized("minmax", 100), images(20, 5)
    rows = account.layers(prepared.graph, int8, scales(prepared), x)
    assert [row["layer"] for row in rows] == ["stem", "conv1", "conv2", "fc"]
    assert all(row["quantized"] for row in rows)
    floats = prepared.graph.model
    for row, made, read in zip(rows, ("b", "d", "e", "logits"), ("images", "b", "d", "i"), strict=True):
        last = made + DEQUANTIZED if made in "bd" else made
        expected, found = run(floats, x, made), run(int8, x, last)
        assert row["output_sqnr_db"] == pytest.approx(plain_sqnr(expected, found), abs=0.1)  # ties
        assert row["output_cosine"] == pytest.approx(plain_cosine(expected, found), abs=1e-4)
        values = x if read == "images" else run(floats, x, read)
        assert row["input_sqnr_db"] == pytest.approx(
            plain_sqnr(values, rounded(values, scales(prepared)[read])), abs=0.01
        )
        clipped = np.abs(values) > 127.5 * scales(prepared)[read]
        assert row["input_clipped"] == pytest.approx(clipped.mean(), abs=1e-9)
        weight = prepared.graph.constants[f"{row['layer']}.weight"]
        found = run(int8, x, f"{row['layer']}.weight{DEQUANTIZED}")
        assert row["weights_sqnr_db"] == pytest.approx(plain_sqnr(weight, found), abs=0.01)
        assert row["weights_cosine"] == pytest.approx(plain_cosine(weight, found), abs=1e-6)
        assert row["suggestion"] == ""


def test_a_layer_in_float_loses_nothing_of_its_own(prepared):
    kept = ["conv1"]
    int8 = prepared.quantized("minmax", 100, kept)
    row = account.layers(prepared.graph, int8, scales(prepared, keep_float=kept), images(8, 1))[1]
    assert (row["quantized"], row["input_sqnr_db"], row["weights_sqnr_db"]) == (False, None, 200)
    assert 20 < row["output_sqnr_db"] < 200  # what came before it is still there


def test_nothing_quantized_is_nothing_lost(prepared):
    rows = account.layers(prepared.graph, prepared.graph.model, {}, images(8, 1))
    assert {row["output_sqnr_db"] for row in rows} == {200}
    assert [row["output_cosine"] for row in rows] == pytest.approx([1] * 4)


def test_suggestions_name_the_cause(prepared):
    x = images(64)
    clipped = scales(prepared, "percentile", 60.0)
    rows = account.layers(prepared.graph, prepared.quantized("percentile", 60), clipped, x)
    assert rows[0]["suggestion"].startswith(
        f"{rows[0]['input_clipped']:.1%} of the inputs of stem are clipped: calibrate"
    )
    stretched = x.copy()
    stretched[0, 0, 0, 0] = 1000
    outlier = ptq.Prepared(
        prepared.graph, ptq.calibration.measure(prepared.graph, ptq.sources(prepared.graph), stretched)
    )
    rows = account.layers(prepared.graph, outlier.quantized("minmax", 100), scales(outlier), x)
    assert rows[0]["suggestion"] == (
        "A few large values stretch the input range of stem: calibrate with percentile or entropy."
    )


def test_a_stretched_weight_is_suggested_for_float(tmp_path):
    model = residual_model()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "conv2.weight")
    values = numpy_helper.to_array(weight).copy()
    values[:, 0, 0, 0] = np.where(np.arange(4) < 4, 1e-3, 0)
    values[:, 1:] *= 1e-4
    values[:, 0, 1:] *= 1e-4
    values[0, 0, 0, 0] = 1
    weight.CopyFrom(
        numpy_helper.from_array(np.where(np.abs(values) < 0.5, values * 3, values).astype(np.float32), weight.name)
    )
    onnx.save(model, tmp_path / "stretched.onnx")
    prepared = ptq.prepare(tmp_path / "stretched.onnx", images(64))
    layer = prepared.graph.layers[2]
    expected = plain_sqnr(layer.weight, account.rounded_weights(layer))
    row = account.layers(prepared.graph, prepared.quantized("minmax", 100), scales(prepared), images(8))[2]
    assert row["weights_sqnr_db"] == pytest.approx(expected, abs=0.01)


def test_lma_rows_follow_from_the_inputs_of_the_layer(prepared):
    curve = {"name": "act", "cuts": [-0.5, 0.1, 0.6], "mu": 0.1, "sigma": 0.3, "max_jump": 0.25}
    x = images(20, 4)
    (row,) = account.lma(prepared.graph, [curve], scales(prepared), x)
    values, step = run(prepared.graph.model, x, "c").ravel(), scales(prepared)["c"]
    segments = [
        np.array([sum(value > cut for cut in curve["cuts"]) for value in v]) for v in (values, rounded(values, step))
    ]
    assert row["layer"] == "act"
    assert row["max_jump"] == 0.25
    assert row["step"] == step
    assert row["changed_segment"] == pytest.approx((segments[0] != segments[1]).mean(), abs=1e-9)
    assert row["changed_segment"] > 0
    assert (row["low"], row["high"]) == (pytest.approx(values.min()), pytest.approx(values.max()))
    assert (row["range_low"], row["range_high"]) == (pytest.approx(-0.8), pytest.approx(1.0))
    assert row["outside"] == pytest.approx(((values < -0.8) | (values > 1.0)).mean(), abs=1e-9)


def test_an_lma_in_float_changes_no_segment(prepared):
    curve = {"name": "act", "cuts": [0.1], "mu": 0.0, "sigma": 1.0, "max_jump": 0.0}
    (row,) = account.lma(prepared.graph, [curve], {}, images(8))
    assert (row["step"], row["changed_segment"]) == (None, 0)


def test_classes_are_counted_each_for_itself():
    labels = np.array([0, 0, 1, 1, 1])
    before = np.eye(3)[[0, 0, 1, 1, 0]]
    after = np.eye(3)[[0, 1, 1, 1, 1]]
    rows = account.classes(Classification(), labels, before, after, ["cat", "dog", "owl"])
    assert [(row["class"], row["n"], row["float_score"], row["score"]) for row in rows] == [
        ("cat", 2, 1.0, 0.5), ("dog", 3, 2 / 3, 1.0), ("owl", 0, None, None),
    ]  # fmt: skip
    assert [row["change"] for row in rows] == [-0.5, pytest.approx(1 / 3), None]
