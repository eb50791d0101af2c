from __future__ import annotations

import numpy as np
import pytest
import torch
from task_answers import Read

from edgekd import data
from edgekd.data.sources.digits import slants
from edgekd.errors import DataError, RecipeError
from edgekd.tasks.regression import Regression


def test_values_are_standardised_cut_and_scored_in_their_unit():
    ages = np.array([20.0, 40.0, 60.0, 80.0])
    task = Regression(unit="years", low=0, high=90).fitted(ages)
    labels = task.stored(ages)
    assert labels.dtype == np.float32 and labels.shape == (4, 1)
    np.testing.assert_allclose(labels[:, 0], (ages - 50) / ages.std(), rtol=1e-6)
    outputs = ((np.array([[22.0], [35.0], [60.0], [200.0]]) - 50) / ages.std()).astype(np.float32)
    np.testing.assert_allclose(task.quality(outputs, labels), [2, 5, 0, 10], atol=1e-4)
    assert task.score(outputs, labels) == pytest.approx(17 / 4, abs=1e-4)
    loss = task.loss(torch.from_numpy(outputs), torch.from_numpy(labels))
    assert float(loss) == pytest.approx((4 + 25 + 100) / 4 / ages.var(), rel=1e-5)
    assert task.metric.text(1.234) == "mae 1.23 years"


def test_agreement_is_lins_concordance():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (50, 1)).astype(np.float32)
    y = (0.5 * x + 0.3).astype(np.float32)
    a, b = x[:, 0].astype(float), y[:, 0].astype(float)
    expected = 2 * np.cov(a, b, bias=True)[0, 1] / (a.var() + b.var() + (a.mean() - b.mean()) ** 2)
    assert Regression(center=0, scale=1).agreement(x, y) == pytest.approx(expected)
    assert Regression(center=0, scale=1).agreement(x, -x) == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([1.0, np.nan, 3.0]), "data.npz: images[1]: the label is NaN or infinite, and 0 more are"),
        (np.array(["a", "b", "c"]), "the labels are <U1 [3]"),
        (np.zeros((3, 2, 2)), "the labels are float64 [3, 2, 2]"),
    ],
)
def test_labels_that_are_no_values_are_refused(labels, message):
    with pytest.raises(DataError) as caught:
        Regression().check(Read(np.zeros((3, 1, 2, 2), np.uint8), labels), ())
    assert message in str(caught.value)


def test_values_that_do_not_differ_are_refused():
    part = Read(np.zeros((3, 1, 2, 2), np.uint8), np.full(3, 7.0))
    with pytest.raises(DataError, match="all 3 training samples have the value 7"):
        Regression().check_against_train("train", part, part, ("value",))


@pytest.mark.parametrize(("options", "what"), [({"low": 5.0, "high": 5.0}, "low = 5"), ({"scale": 0.0}, "scale = 0")])
def test_a_range_without_values_is_refused(options, what):
    with pytest.raises(RecipeError, match=what):
        Regression(**options)


def test_the_slant_of_digits_is_that_of_their_moments():
    upright = np.zeros((1, 1, 8, 8), np.uint8)
    upright[0, 0, 1:7, 3] = 255
    leaning = np.zeros((1, 1, 8, 8), np.uint8)
    leaning[0, 0, range(1, 7), range(6, 0, -1)] = 255  # from the lower left to the upper right
    assert slants(np.concatenate([upright, leaning])) == pytest.approx([0, 45])


def test_an_archive_of_values_is_read_where_the_recipe_says_so(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.uniform(18, 80, 60)
    np.savez(tmp_path / "ages.npz", x_train=rng.integers(0, 256, (60, 8, 8), np.uint8), y_train=values)
    dataset = data.load("npz", {"path": tmp_path / "ages.npz"}, task={"regression": {"unit": "years"}})
    assert dataset.outputs == (1,) and dataset.class_names == ("value",)
    assert dataset.task.metric.unit == "years"
    found = np.concatenate([dataset.task.values(dataset.split(name).labels) for name in ("train", "val", "test")])
    np.testing.assert_allclose(np.sort(found[:, 0]), np.sort(values), rtol=1e-5)
    again = data.load("npz", {"path": tmp_path / "ages.npz"}, task=dataset.task.choice, train_limit=20)
    assert again.task.choice == dataset.task.choice
