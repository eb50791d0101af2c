"""Every registered task keeps the contract of `Task`: tested on arrival."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from task_answers import N, Read, fitted, read, right_answers

from edgekd import registry, tasks
from edgekd.errors import DataError
from edgekd.tasks import Metric

TASKS = registry.names("task")


def spoilt(outputs: np.ndarray, seed: int, share: float = 0.5) -> np.ndarray:
    """The answers of some samples given to others."""
    rng = np.random.default_rng(seed)
    some = rng.permutation(len(outputs))[: round(share * len(outputs))]
    worse = outputs.copy()
    worse[some] = outputs[np.roll(some, 1)]
    return worse


@pytest.mark.parametrize("name", TASKS)
def test_the_score_is_the_mean_quality_and_right_answers_are_best(name):
    task, labels, names = fitted(name)
    right = right_answers(task, labels, names)
    assert right.shape == (N, *task.output_shape(names, (1, 6, 6)))
    wrong = spoilt(right, 1)
    for outputs in (right, wrong):
        quality = task.quality(outputs, labels)
        assert quality.shape == (N,) and quality.dtype in (bool, np.float64)
        assert task.score(outputs, labels) == pytest.approx(quality.mean())
    best, worse = task.score(right, labels), task.score(wrong, labels)
    assert best == pytest.approx(1.0 if task.metric.higher_is_better else 0.0, abs=1e-5)
    assert task.metric.goodness(worse) < task.metric.goodness(best)
    assert task.metric.gain(worse) < task.metric.gain(best)


@pytest.mark.parametrize("name", TASKS)
def test_torch_and_numpy_score_alike_and_the_loss_falls_to_the_labels(name):
    task, labels, names = fitted(name)
    right = right_answers(task, labels, names)
    outputs = torch.from_numpy(spoilt(right, 1)).requires_grad_()
    expected = torch.from_numpy(labels)
    found = task.batch_score(outputs.detach(), expected)
    assert float(found) == pytest.approx(task.score(outputs.detach().numpy(), labels), rel=1e-4)
    loss = task.loss(outputs, expected)
    assert loss.shape == () and loss > task.loss(torch.from_numpy(right), expected)
    loss.backward()
    assert outputs.grad.isfinite().all() and outputs.grad.abs().sum() > 0


@pytest.mark.parametrize("name", TASKS)
def test_agreement_is_one_with_itself_and_less_with_others(name):
    task, labels, names = fitted(name)
    right = right_answers(task, labels, names)
    assert task.agreement(right, right) == pytest.approx(1.0)
    assert 0 <= task.agreement(right, spoilt(right, 1)) < 0.95
    assert task.agree


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_made_again_from_what_a_manifest_says(name):
    task, labels, names = fitted(name)
    described = json.loads(json.dumps(task.described()))
    ((found, options),) = described["task"].items()
    again = registry.create("task", found, options=options)
    assert found == name and Metric(**described["metric"]) == again.metric == task.metric
    outputs = spoilt(right_answers(task, labels, names), 1)
    np.testing.assert_array_equal(again.quality(outputs, labels), task.quality(outputs, labels))


@pytest.mark.parametrize("name", TASKS)
def test_changes_are_told_from_chance(name):
    task, labels, names = fitted(name)
    right = right_answers(task, labels, names)
    good, bad = (task.quality(outputs, labels) for outputs in (right, spoilt(right, 1, 0.8)))
    same = tasks.change(good, good)
    assert same["value"] == 0 and same["p_value"] == 1
    change = tasks.change(good, bad)
    assert change["value"] == pytest.approx(bad.mean() - good.mean())
    assert change["ci95"][0] <= change["value"] <= change["ci95"][1]
    assert change["p_value"] < 0.01 and change["test"] in ("McNemar", "sign flips")
    assert task.metric.goodness(change["value"]) < 0
    measured = tasks.summary(bad)
    assert measured["n"] == N and measured["ci95"][0] <= measured["score"] <= measured["ci95"][1]


@pytest.mark.parametrize("name", TASKS)
def test_every_sample_has_a_stratum_and_counts_are_of_samples(name):
    task, labels, names = fitted(name)
    strata = task.strata(labels)
    assert strata.shape == (N,) and strata.dtype == np.int64 and strata.min() >= 0
    counts = task.counts(labels, names)
    assert not counts or set(counts) == set(names)
    rows = task.by_class(right_answers(task, labels, names), labels, names)
    assert [n for n, _ in rows] == list(counts.values())[: len(rows)]


@pytest.mark.parametrize("name", TASKS)
def test_labels_of_fewer_samples_are_refused(name):
    part = read(name)
    fewer = Read(part.images, part.labels[:-1])
    with pytest.raises(DataError, match=f"{N} images, but labels of shape"):
        registry.create("task", name).check(fewer, ())
