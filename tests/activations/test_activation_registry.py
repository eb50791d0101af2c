"""Every registered activation, whatever it is, and the values of those that LMA is compared with."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgekd import registry
from edgekd.errors import RecipeError

ACTIVATIONS = registry.names("activation")
CHANNELS = 5


def create(name, **options):
    torch.manual_seed(0)
    return registry.create("activation", name, CHANNELS, options=options)


def perturbed(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("shape", [(6, CHANNELS), (6, CHANNELS, 4, 3)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forward_and_backward(name, shape):
    layer = perturbed(create(name))
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    for gradient in (x.grad, *(parameter.grad for parameter in layer.parameters())):
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_state_round_trip(name, tmp_path):
    layer = perturbed(create(name))
    layer(torch.randn(20, CHANNELS))
    save_file(layer.state_dict(), tmp_path / "weights.safetensors")
    other = create(name)
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    x = torch.randn(3, CHANNELS)
    expected = layer.eval()(x)
    assert torch.equal(other.eval()(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_autocast(name):
    network = nn.Sequential(nn.Linear(4, CHANNELS), create(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = network(torch.randn(6, 4))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert network[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_channels_last(name):
    layer = create(name).eval()
    x = torch.randn(2, CHANNELS, 4, 3)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))


def test_baselines_follow_their_formulas():
    x = np.random.default_rng(0).normal(size=(6, CHANNELS, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(create("relu")(torch.tensor(x)).numpy(), np.maximum(x, 0))
    np.testing.assert_allclose(create("prelu")(torch.tensor(x)).detach().numpy(), np.where(x > 0, x, 0.25 * x))
    np.testing.assert_allclose(create("swish")(torch.tensor(x)).detach().numpy(), x / (1 + np.exp(-x)), rtol=1e-5)

    swish = perturbed(create("swish"))
    beta = swish.beta.detach().numpy()[:, None, None]
    np.testing.assert_allclose(swish(torch.tensor(x)).detach().numpy(), x / (1 + np.exp(-beta * x)), rtol=1e-5)

    aplu = create("aplu", k=5)
    slopes, hinges = (values.detach().numpy()[:, None, :, None, None] for values in (aplu.slopes, aplu.hinges))
    expected = np.maximum(x, 0) + (slopes * np.maximum(0, hinges - x)).sum(0)
    np.testing.assert_allclose(aplu(torch.tensor(x)).detach().numpy(), expected, atol=1e-6)


def test_parameter_counts():
    counts = {name: sum(parameter.numel() for parameter in create(name).parameters()) for name in ACTIVATIONS}
    assert counts == {"relu": 0, "prelu": 1, "swish": CHANNELS, "aplu": 2 * 6 * CHANNELS, "lma": 16}


def test_aplu_starts_as_published():
    aplu = registry.create("activation", "aplu", 10_000, options={"k": 3})
    assert aplu.slopes.abs().max() <= 0.5
    assert aplu.slopes.std().item() == pytest.approx(1 / np.sqrt(12), rel=0.05)
    assert aplu.hinges.std().item() == pytest.approx(0.5, rel=0.05)


def test_aplu_without_a_hinge():
    with pytest.raises(RecipeError) as caught:
        create("aplu", k=2)
    assert str(caught.value) == (
        "error: activation aplu: k = 2 leaves no hinge\n"
        "       k: a whole number of at least 3; APLU-k has k - 2 hinges\n"
        'fix:   set k = 8, or use the activation "relu"'
    )
