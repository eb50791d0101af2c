"""The learning rate against plain formulas, and against torch's own schedulers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd.learning_rate import falls, learning_rate
from edgekd.recipe import Train

EPOCHS, UPDATES = 10, 70


def curve(accuracies=(), **train) -> np.ndarray:
    spec = Train(**{"epochs": EPOCHS, "lr": 0.2, **train})
    return np.array([learning_rate(spec, update, UPDATES, accuracies) for update in range(UPDATES)])


def test_constant():
    np.testing.assert_array_equal(curve(schedule="constant"), 0.2)


def test_cosine():
    expected = 0.1 * (1 + np.cos(np.pi * np.arange(UPDATES) / UPDATES))
    np.testing.assert_allclose(curve(schedule="cosine"), expected, rtol=1e-12)


def test_cosine_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    expected = []
    for _ in range(UPDATES):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(curve(schedule="cosine"), expected, rtol=1e-9)


def test_step():
    expected = np.repeat([0.2, 0.06, 0.018], [35, 21, 14])
    np.testing.assert_allclose(curve(schedule="step", milestones=[0.5, 0.8], gamma=0.3), expected, rtol=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step", "plateau"])
def test_warmup_rises_to_lr_and_the_schedule_follows(schedule):
    with_warmup, without = (curve(schedule=schedule, warmup=warmup, milestones=[0.5]) for warmup in (2, 0))
    np.testing.assert_allclose(with_warmup[:14], 0.2 * np.arange(1, 15) / 14, rtol=1e-12)
    if schedule == "cosine":
        expected = 0.1 * (1 + np.cos(np.pi * np.arange(56) / 56))
        np.testing.assert_allclose(with_warmup[14:], expected, rtol=1e-12)
    else:
        np.testing.assert_array_equal(with_warmup[14:], without[14:])


@pytest.mark.parametrize("warmup", [10, 25])
def test_a_warmup_as_long_as_the_training_or_longer(warmup):
    np.testing.assert_allclose(curve(warmup=warmup), 0.2 * np.arange(1, 71) / 70, rtol=1e-12)


def test_plateau_falls_with_the_accuracies():
    assert curve([0.5, 0.6, 0.6, 0.6], schedule="plateau", patience=1, gamma=0.5)[0] == 0.1
    assert curve([0.5, 0.6, 0.6, 0.6], schedule="cosine", patience=1, gamma=0.5)[0] == 0.2


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_plateau_falls_when_that_of_torch_falls(patience):
    rng = np.random.default_rng(patience)
    for _ in range(20):
        accuracies = np.round(np.minimum(1, rng.random(60).cumsum() / 40) + rng.normal(0, 0.02, 60), 3).tolist()
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=0.5, patience=patience, threshold=0.001, threshold_mode="abs", eps=0
        )
        for number in range(60):
            scheduler.step(accuracies[number])
            assert 0.5 ** falls(accuracies[: number + 1], patience) == optimizer.param_groups[0]["lr"]
