"""A network that sees one sensor of several, the data that have two, and the recipe that makes use of both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd import data, networks
from edgekd import recipe as recipes
from edgekd.data import Shape
from edgekd.errors import RecipeError
from edgekd.methods.taps import Taps, default_taps

BOTH = Shape(3, 8, 8)
NARROW = {"network": "resnet", "depth": 8, "width": 0.25}


def build(channels: list[int], activation: str = "relu", **of) -> torch.nn.Module:
    options = {"channels": channels, "of": {**NARROW, **of}}
    return networks.build("sensor", options, BOTH, 10, (activation, {}), 0).eval()


@pytest.mark.parametrize("channels", [[1], [2, 0]])
def test_it_computes_what_its_network_computes_of_its_channels(channels):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = build(channels)
    torch.testing.assert_close(made(x), made.network(x[:, channels]))
    others = [channel for channel in range(3) if channel not in channels]
    blind = x.clone()
    blind[:, others] = 1e3
    torch.testing.assert_close(made(blind), made(x))


def test_it_is_tapped_in_its_network():
    made = build([1])
    assert default_taps(made, "embedding", "student") == ["network.pool"]
    assert Taps(made, default_taps(made, "maps", "student"), "student").probe(made, torch.randn(2, 3, 8, 8))


def test_its_activations_can_be_swapped_and_its_weights_brought_along(tmp_path):
    assert any(type(module).__name__ == "LMA" for module in build([0], "lma").modules())
    trained = networks.build("resnet", {"depth": 8, "width": 0.25}, Shape(1, 8, 8), 10, ("relu", {}), 1).eval()
    networks.save_weights(trained, tmp_path / "old.safetensors")
    made = build([1], checkpoint=str(tmp_path / "old.safetensors"))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(made(x), trained(x[:, 1:2]))
    assert networks.is_trained(made) and not networks.is_trained(build([1]))


@pytest.mark.parametrize("channels", [[], [3], [-1], [0, 0]])
def test_channels_that_are_not_there(channels):
    with pytest.raises(RecipeError) as caught:
        build(channels)
    assert str(caught.value) == (
        f"error: network sensor cannot see the channels {channels} of images 3x8x8\n"
        "       expected: some of 0, 1, 2, each once\n"
        "fix:   set channels to those of its sensor"
    )


def test_the_second_sensor_of_the_digits_is_coarse_noisy_and_always_the_same():
    both, scans = data.load("digit_sensors", {}), data.load("digits", {})
    np.testing.assert_array_equal(both.train.images[:, :1], scans.train.images)
    seen = both.train.images[:, 1].astype(float)
    cells = seen[:, ::2, ::2]
    np.testing.assert_array_equal(seen, cells.repeat(2, 1).repeat(2, 2))
    noise = cells - scans.train.images[:, 0].reshape(-1, 4, 2, 4, 2).mean((2, 4))
    inside = (cells > 80) & (cells < 175)  # not cut off at black and white
    assert 20 < noise[inside].std() < 28
    np.testing.assert_array_equal(both.test.images, data.load("digit_sensors", {}).test.images)


def test_the_recipe_gives_each_network_its_sensor():
    recipe = recipes.load("digits-sensor")
    assert (recipe.teacher.options["channels"], recipe.student.options["channels"]) == ([0], [1])
