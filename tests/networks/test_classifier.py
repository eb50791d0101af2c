"""The angles between a classifier's class vectors, against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.networks import class_angles
from edgekd.networks.classifier import angles_between, classifiers


def test_angles_against_numpy():
    vectors = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    unit = vectors.double().numpy() / np.linalg.norm(vectors.double().numpy(), axis=1, keepdims=True)
    expected = [np.degrees(np.arccos(unit[i] @ unit[j])) for i in range(4) for j in range(i + 1, 4)]
    np.testing.assert_allclose(angles_between(vectors).numpy(), expected, rtol=1e-4)


def test_the_last_layer_with_a_row_for_each_class_is_the_classifier():
    network = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 7), nn.Conv2d(4, 3, 1))
    assert list(classifiers(network, 3)) == ["0", "3"]
    with torch.no_grad():
        network[3].weight[:, :, 0, 0] = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]])
    assert class_angles(network, 3) == {
        "smallest_deg": pytest.approx(45), "mean_deg": pytest.approx(60), "largest_deg": pytest.approx(90),
        "closest": [0, 2],
    }  # fmt: skip
    assert class_angles(nn.Sequential(nn.Linear(5, 3)), 4) is None
    assert class_angles(nn.Sequential(nn.Linear(5, 1)), 1) is None
