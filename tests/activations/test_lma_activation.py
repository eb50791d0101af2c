"""The LMA layer against its equations (Xu et al., AAAI-20), and what a layer with state has to survive."""

import copy
import multiprocessing

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from edgekd.activations import LMA, freeze_statistics, multi_segment_layers
from edgekd.activations.lma import lma
from edgekd.errors import RecipeError

EITHER = pytest.mark.parametrize("continuous", [False, True])


def learned(k=8, continuous=False, seed=0, **options):
    """A layer whose slopes and biases are no longer those of ReLU."""
    torch.manual_seed(seed)
    layer = lma(3, k=k, continuous=continuous, **options)
    nn.init.normal_(layer.slope_deltas, 0, 0.5)
    nn.init.normal_(layer.biases, 0, 0.5)
    return layer


def equations(x, slopes, biases, mean, std):
    """Output and segment of each x, in NumPy."""
    k = len(slopes)
    cuts = mean - 3 * std + 6 * std / k * np.arange(1, k)
    index = np.searchsorted(cuts, x, side="left")  # x in (cut, next cut]
    return slopes[index] * x + biases[index], index


def numbers(layer):
    return tuple(values.detach().double().numpy() for values in layer.segments()[1:])


@EITHER
@pytest.mark.parametrize("k", [2, 4, 8, 12])
def test_starts_as_relu_on_a_zero_mean_batch(k, continuous):
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    x = torch.cat((x, -x))
    layer = lma(3, k=k, continuous=continuous).double()
    torch.testing.assert_close(layer(x), x.relu())
    torch.testing.assert_close(layer.eval()(x), x.relu())


@EITHER
def test_starts_with_its_kink_at_the_mean(continuous):
    x = torch.randn(4, 3, 8, 8) + 5
    y = lma(3, continuous=continuous)(x)
    expected = (x - x.mean()).relu() if continuous else x * (x > x.mean())
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [2, 4, 8, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradients_follow_the_equations(k, dtype):
    layer = learned(k).to(dtype)
    x = (torch.randn(4, 3, 9, 7, dtype=dtype) * 1.7 + 0.4).requires_grad_()
    grad = torch.randn_like(x)
    y = layer(x)
    y.backward(grad)

    values, g = x.detach().double().numpy(), grad.double().numpy()
    slopes, biases = numbers(layer)
    expected, index = equations(values, slopes, biases, values.mean(), values.std(ddof=1))
    tolerance = {"rtol": 1e-4, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    np.testing.assert_allclose(y.detach().numpy(), expected, **tolerance)
    np.testing.assert_allclose(x.grad.numpy(), g * slopes[index], **tolerance)
    for j in range(k):
        np.testing.assert_allclose(layer.slope_deltas.grad[j].item(), (g * values)[index == j].sum(), **tolerance)
        np.testing.assert_allclose(layer.biases.grad[j].item(), g[index == j].sum(), **tolerance)


@pytest.mark.parametrize("k", [2, 8])
def test_continuous_pieces_meet(k):
    layer = learned(k, continuous=True)
    layer(torch.randn(64, 3, 8, 8) * 2 + 0.5)
    cuts, slopes, biases = layer.segments()
    jumps = slopes.diff() * cuts + biases.diff()
    assert jumps.abs().max() < 1e-6
    assert sum(parameter.numel() for parameter in layer.parameters()) == k + 1
    middle = layer.eval()(cuts[k // 2 - 1].detach())
    torch.testing.assert_close(middle, layer.biases.detach()[0])  # what the one offset means


def test_continuous_gradients_follow_finite_differences():
    layer = learned(4, continuous=True).double().eval()
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)

    def apply(x, slope_deltas, biases):
        return torch.func.functional_call(layer, {"slope_deltas": slope_deltas, "biases": biases}, (x,))

    assert torch.autograd.gradcheck(apply, (x, layer.slope_deltas, layer.biases))


def test_has_two_parameters_per_segment_and_weight_decay_pulls_to_relu():
    layer = learned(8)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 16
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, weight_decay=1.0)
    for _ in range(50):
        optimizer.zero_grad()
        (layer(torch.randn(8, 3)) * 0).sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer.segments().slopes, torch.tensor([0.0] * 4 + [1.0] * 4))
    torch.testing.assert_close(layer.segments().biases, torch.zeros(8))


def test_statistics_start_with_the_first_batch_and_then_average():
    layer = lma(3, momentum=0.9)
    first, second = torch.randn(2, 8, 3, 4, 4) * torch.tensor([2.0, 5.0])[:, None, None, None, None] + 1
    layer(first)
    expected = torch.stack((first.mean(), first.std()))
    torch.testing.assert_close(layer.running, expected)
    layer(second)
    torch.testing.assert_close(layer.running, 0.9 * expected + 0.1 * torch.stack((second.mean(), second.std())))
    assert layer.num_batches == 2


@EITHER
def test_eval_is_pure_and_independent_of_the_batch(continuous):
    layer = learned(continuous=continuous)
    x = torch.randn(32, 3, 8, 8)
    layer(x)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    whole = layer(x)
    alone = torch.cat([layer(sample) for sample in x.split(1)])
    assert torch.equal(whole, alone)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_frozen_statistics_stay_in_training():
    network = nn.Sequential(learned(), nn.Linear(3, 3), learned())
    network(torch.randn(16, 3))
    x = torch.randn(16, 3) * 9
    before = [layer.running.clone() for _, layer in multi_segment_layers(network)]
    freeze_statistics(network)
    assert torch.equal(network.train()(x), network.eval()(x))
    network.train()
    assert all(
        torch.equal(old, layer.running) for old, (_, layer) in zip(before, multi_segment_layers(network), strict=True)
    )
    freeze_statistics(network, frozen=False)
    network(x)
    assert not torch.equal(network[0].running, before[0])


@EITHER
def test_save_and_load_keep_the_cuts(tmp_path, continuous):
    layer = learned(continuous=continuous)
    layer(torch.randn(64, 3, 4, 4) * 3 + 1)
    save_file(layer.state_dict(), tmp_path / "weights.safetensors")
    other = lma(3, continuous=continuous)
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    x = torch.randn(5, 3, 4, 4)
    assert torch.equal(layer.eval()(x), other.eval()(x))
    layer.train()(x)
    other.train()(x)
    assert torch.equal(layer.running, other.running)  # it goes on averaging, and does not start again


def test_deepcopy_is_apart_from_its_original():
    layer = learned()
    twin = copy.deepcopy(layer)
    twin(torch.randn(64) + 7)
    assert layer.num_batches == 0
    assert layer.running.tolist() == [0, 1]


def test_conversion_to_another_dtype_keeps_the_moving_average_exact():
    layer = learned()
    layer(torch.randn(1000) + 0.123456)
    exact = layer.running.clone()
    assert torch.equal(layer.half().running, exact)
    assert torch.equal(layer.bfloat16().running, exact)
    assert layer.double().running.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    layer = learned()
    x = torch.randn(64, 3, 4, 4).to(dtype)
    exact = copy.deepcopy(layer)(x.float())
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    y.float().sum().backward()
    assert layer.slope_deltas.grad.dtype == torch.float32


def test_autocast_keeps_statistics_in_float32():
    network = nn.Sequential(nn.Linear(8, 8), learned())
    x = torch.randn(4096, 8) + 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = network[0](x)
        y = network[1](hidden)
    assert hidden.dtype == y.dtype == torch.bfloat16
    y.float().sum().backward()
    statistics = torch.stack((hidden.float().mean(), hidden.float().std()))
    assert network[1].running.dtype == torch.float32
    torch.testing.assert_close(network[1].running, statistics)


@EITHER
def test_constant_input_meets_the_floor_of_the_deviation(continuous):
    layer = learned(continuous=continuous)
    y = layer(torch.full((4, 3), 2.0))
    y.sum().backward()
    assert y.isfinite().all()
    assert layer.slope_deltas.grad.isfinite().all()
    assert (layer.segments().cuts.diff() > 0).all()


def test_one_value_is_a_batch():
    layer = learned()
    layer(torch.tensor([2.0]))
    assert layer.running.tolist() == [2, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("seen", [0, 1])
def test_a_batch_that_is_not_finite_shows_and_leaves_the_average(bad, seen):
    layer = learned()
    for _ in range(seen):
        layer(torch.randn(100))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(100)
    x[3] = bad
    y = layer(x)
    assert not y[3].isfinite()
    assert torch.cat((y[:3], y[4:])).isfinite().all()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    layer(torch.randn(100))
    assert layer.num_batches == seen + 1


def test_statistics_are_exact_far_from_zero():
    x = torch.randn(100_000) * 1e-2 + 100  # the square of the mean is 1e8 times the variance
    layer = lma(3)
    layer(x)
    np.testing.assert_allclose(layer.running[1].item(), x.double().std().item(), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "activation lma: k = 1 does not split the range around the mean into two equal halves"),
        ({"k": 7}, "k: an even number of at least 2; the paper uses 4 to 12"),
        ({"momentum": 1.5}, "activation lma: momentum = 1.5 is not a share of the past to keep"),
        ({"momentum": -0.1}, "momentum: at least 0 and below 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(RecipeError) as caught:
        lma(3, **options)
    assert message in str(caught.value)


def test_layers_are_found_by_name():
    network = nn.Sequential(nn.ReLU(), nn.Sequential(lma(3)))
    assert [(name, type(layer)) for name, layer in multi_segment_layers(network)] == [("1.0", LMA)]


def _network():
    network = nn.Sequential(nn.Linear(6, 16), learned(seed=1), nn.Linear(16, 16), learned(seed=2, continuous=True))
    for index, parameter in enumerate(network.parameters()):
        parameter.data = torch.linspace(-0.4, 0.5, parameter.numel()).roll(index).reshape(parameter.shape)
    return network


def _train(network, inputs):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for x in inputs:
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()


def _rank(rank, folder, inputs):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        network = _network()
        _train(DistributedDataParallel(network), inputs[:, rank])
    finally:
        dist.destroy_process_group()
    return network.state_dict()


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    torch.manual_seed(0)
    inputs = torch.randn(4, 2, 32, 6) + torch.tensor([0.0, 2.0])[:, None, None]  # the ranks see different statistics
    network = _network()
    _train(network, inputs.flatten(1, 2))
    other = multiprocessing.get_context("spawn").Process(target=_rank, args=(1, str(tmp_path), inputs))
    other.start()
    for name, value in _rank(0, tmp_path, inputs).items():
        torch.testing.assert_close(value, network.state_dict()[name], rtol=1e-4, atol=1e-6)
    other.join(60)
    assert other.exitcode == 0
