"""The learned curves and input histograms that the report draws."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.activations import curves, input_histograms
from edgekd.activations.lma import lma


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(3, 5), lma(5, k=4), nn.Dropout(), nn.Sequential(lma(5, k=8, continuous=True)), nn.ReLU()
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network(torch.randn(100, 3))
    return network


@pytest.mark.parametrize("index", [0, 1])
def test_curve_is_the_layer(network, index):
    curve = curves(network)[index]
    name, layer = [("1", network[1]), ("3.0", network[3][0])][index]
    assert json.loads(json.dumps(curve)) == curve
    assert (curve["name"], curve["kind"], curve["k"], curve["continuous"]) == (name, "lma", [4, 8][index], bool(index))
    assert [curve["mu"], curve["sigma"]] == layer.running.tolist()
    k = curve["k"]
    assert (len(curve["cuts"]), len(curve["slopes"]), len(curve["biases"])) == (k - 1, k, k)
    assert len(curve["x"]) == len(curve["y"]) == 65 + 2 * (k - 1)
    x, y = np.array(curve["x"]), np.array(curve["y"])
    assert (np.diff(x) >= 0).all()
    np.testing.assert_allclose(x[[0, -1]], curve["mu"] + np.array([-4, 4]) * curve["sigma"])
    segment = np.searchsorted(curve["cuts"], x)
    np.testing.assert_allclose(y, np.array(curve["slopes"])[segment] * x + np.array(curve["biases"])[segment])


def test_largest_jump(network):
    jumping, continuous = curves(network)
    assert continuous["max_jump"] < 1e-6
    x, y = np.array(jumping["x"]), np.array(jumping["y"])
    steps = [y[np.searchsorted(x, cut, "right")] - y[np.searchsorted(x, cut)] for cut in jumping["cuts"]]
    assert jumping["max_jump"] == pytest.approx(np.abs(steps).max())


def test_histogram_counts_what_the_layer_is_given(network):
    x = torch.randn(200, 3) * 2
    first, second = input_histograms(network, x, bins=32)
    assert [first["name"], second["name"]] == ["1", "3.0"]
    mu, sigma = network[1].running.tolist()
    assert [first["low"], first["high"]] == pytest.approx([mu - 4 * sigma, mu + 4 * sigma])
    values = network[0](x).detach().double().numpy()
    expected = np.histogram(values, 32, (first["low"], first["high"]))[0]
    assert np.abs(np.array(first["counts"]) - expected).sum() <= 2  # rounding at the edges of a bin
    assert first["below"] == (values < first["low"]).sum()
    assert first["above"] == (values > first["high"]).sum()
    assert sum(second["counts"]) + second["below"] + second["above"] == values.size
    assert json.loads(json.dumps([first, second])) == [first, second]


def test_histograms_leave_the_network_as_it_was(network):
    network[2].eval()
    modes = [module.training for module in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    input_histograms(network, torch.randn(50, 3))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_network_without_segments():
    assert curves(nn.ReLU()) == input_histograms(nn.ReLU(), torch.randn(3)) == []
