from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from small_models import SHAPE, images, residual_model, run

from edgekd.errors import DataError
from edgekd.quantize import calibration, sessions
from edgekd.quantize.graph import Graph


def measured(n=40, model=None, tensors=("images", "c", "h"), x=None):
    return calibration.measure(Graph(model or residual_model()), tensors, images(n) if x is None else x)


def test_ranges_and_counts_are_those_of_all_values():
    ranges = measured(70)
    for name in ("images", "c", "h"):
        values = np.abs(images(70) if name == "images" else run(residual_model(), images(70), name))
        assert ranges.largest[name] == pytest.approx(values.max(), rel=1e-6)
        counts = np.histogram(values, calibration.BINS, (0, values.max()))[0]
        assert ranges.counts[name].sum() == values.size
        assert np.abs(ranges.counts[name] - counts).sum() < 1e-3 * values.size  # ties at an edge


def test_memory_is_bounded_and_batches_change_nothing(monkeypatch):
    whole = measured()
    monkeypatch.setattr(sessions, "BYTES_AT_ONCE", 1)
    graph = Graph(residual_model())
    assert [len(batch["c"]) for batch in sessions.activations(graph, ["c"], images(3))] == [1, 1, 1]
    one_by_one = measured()
    assert all(np.array_equal(whole.counts[name], one_by_one.counts[name]) for name in whole.counts)


def test_the_same_images_give_the_same_ranges():
    first, second = measured(), measured()
    assert first.largest == second.largest
    assert all(np.array_equal(first.counts[name], second.counts[name]) for name in first.counts)


def test_minmax_clips_nothing_and_percentile_its_share():
    values = np.abs(np.random.default_rng(1).standard_normal(100_000)).astype(np.float32)
    counts = np.histogram(values, calibration.BINS, (0, values.max()))[0]
    assert calibration.threshold(counts, values.max(), "minmax", 99) == values.max()
    for percentile in (90, 99, 99.9):
        found = calibration.threshold(counts, float(values.max()), "percentile", percentile)
        assert found == pytest.approx(np.percentile(values, percentile), abs=float(values.max()) / 1000)


def plain_divergence(bins, stop):
    """KL(p, q) of Migacz 2017, one bin after the other."""
    p = bins[:stop].astype(float)
    p[-1] += bins[stop:].sum()
    q = np.zeros(stop)
    for level in range(calibration.LEVELS):
        inside = [i for i in range(stop) if i * calibration.LEVELS // stop == level]
        used = [i for i in inside if bins[i] > 0]
        for i in used:
            q[i] = bins[inside].sum() / len(used)
    if np.any((p > 0) & (q == 0)):
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_entropy_is_the_divergence_of_its_definition():
    values = np.abs(np.random.default_rng(2).standard_t(3, 20_000))
    counts = np.histogram(values, calibration.BINS, (0, values.max()))[0]
    bins = counts.copy()
    bins[0] = bins[1]
    stops = np.array([128, 130, 200, 333, 1000, 2048])
    found = calibration.divergences(counts, stops)
    assert found == pytest.approx([plain_divergence(bins, stop) for stop in stops], rel=1e-9)
    assert np.isfinite(found).any()


def test_entropy_clips_outliers_but_not_a_flat_distribution():
    flat = np.full(calibration.BINS, 10)
    assert calibration.entropy_bins(flat) == calibration.BINS
    values = np.append(np.abs(np.random.default_rng(3).standard_normal(100_000)), 40)
    outlier = np.histogram(values, calibration.BINS, (0, 40))[0]
    assert calibration.entropy_bins(outlier) * 40 / calibration.BINS < 5
    alone = np.zeros(calibration.BINS, int)
    alone[-1] = 1
    assert calibration.entropy_bins(alone) == calibration.BINS


def test_a_tensor_of_zeros_gets_scale_1_and_a_warning():
    model = residual_model()
    for tensor in model.graph.initializer:
        if tensor.name.startswith("stem."):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 0, tensor.name))
    ranges = measured(model=model, tensors=("b",))
    for method in ("minmax", "entropy", "percentile"):
        assert ranges.scales(method, 99.9) == {"b": 1}
    assert ranges.warnings == ("always zero on the calibration images: b; scale 1 is used",)


def test_few_and_constant_images_are_warned_of():
    x = images(4)
    x[1], x[2] = 0.5, 0
    few, constant = measured(x=x).warnings
    assert few == "calibrated on 4 images: fewer than 32 rarely show the range of a layer"
    assert constant == "2 of 4 calibration images are of one value throughout"


BAD = {
    "size": (np.zeros((40, 3, 12, 13), np.float32), "are [40, 3, 12, 13], the model takes 3x12x12"),
    "rank": (np.zeros((3, 12, 12), np.float32), "are [3, 12, 12], the model takes 3x12x12"),
    "none": (np.zeros((0, *SHAPE), np.float32), "there are no calibration images"),
    "type": (np.zeros((40, *SHAPE), np.uint8), "the calibration images are uint8"),
}


@pytest.mark.parametrize("case", BAD)
def test_images_that_do_not_fit_are_refused(case):
    x, text = BAD[case]
    with pytest.raises(DataError) as caught:
        measured(x=x)
    assert text in str(caught.value)
    assert caught.value.allowed.startswith("expected: ")
    assert caught.value.fix


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_images_that_are_not_finite_are_refused(bad):
    x = images(40)
    x[7, 0, 0, 0] = bad
    with pytest.raises(DataError) as caught:
        measured(x=x)
    assert str(caught.value).splitlines() == [
        "error: calibration image 7 holds NaN or infinity",
        "       1 of 40 images do",
        "fix:   repair the data, or leave these images out",
    ]


def test_a_fixed_batch_needs_a_multiple_of_it():
    model = residual_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    del model.graph.value_info[:]
    assert measured(8, model=model, tensors=("c",)).images == 8
    with pytest.raises(DataError) as caught:
        measured(7, model=model, tensors=("c",))
    assert "takes 4 images at once, and there are 7" in str(caught.value)


def test_a_layer_with_an_infinite_range_is_an_error():
    model = residual_model()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "conv1.weight")
    weight.CopyFrom(numpy_helper.from_array(np.full((4, 4, 3, 3), 3e38, np.float32), "conv1.weight"))
    onnx.checker.check_model(model)
    with pytest.raises(DataError) as caught:
        measured(model=model)
    assert "error: tensor c is not finite on the calibration images" in str(caught.value)
    assert "fix:   train the network again" in str(caught.value)
