"""Networks get physically smaller and compute the same, whatever their forward does with channels."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from edgekd import networks
from edgekd.data import Shape
from edgekd.networks.channels import coupled_channels
from edgekd.networks.slimming import restructure, shrink

SHAPE = Shape(3, 16, 16)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """Concatenation, grouped and depthwise convolutions with multiplier 2, a gate, PReLU, flatten, a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 10, 3, padding=1, stride=1)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=2)
        self.act = nn.PReLU(24)
        self.wide = nn.Conv2d(24, 48, 3, padding=1, groups=24, bias=False)
        self.norm = nn.BatchNorm2d(48)
        self.squeeze, self.excite = nn.Linear(48, 7), nn.Linear(7, 48)
        self.narrow = nn.Conv2d(48, 5, 1)
        self.again = nn.Conv2d(5, 5, 1)
        self.pool = nn.AdaptiveMaxPool2d(3)
        self.hidden, self.head = nn.Linear(45, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.cat([self.left(x).relu(), self.right(x)], 1)
        out = self.norm(self.wide(self.act(self.grouped(out))))
        gate = self.excite(torch.relu(self.squeeze(out.mean((2, 3))))).sigmoid()
        out = self.narrow(nn.functional.hardswish(out * gate[:, :, None, None]))
        out = self.pool(self.again(self.again(out)))
        return self.head(torch.relu(self.hidden(out.flatten(1))))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "mixed":
        return Mixed()
    network, _, activation = name.partition("-")
    options = {"resnet": {"depth": 14, "width": 0.5}, "wrn": {"depth": 10, "k": 1}, "mobilenet_v2": {"width": 0.1}}
    return networks.build(network, options.get(network, {}), SHAPE, 4, (activation or "relu", {}), 0)


NAMES = ("mixed", "resnet", "resnet-lma", "wrn-lma", "mobilenet_v2", "lma_student-lma")


def trained(name: str) -> nn.Module:
    """With statistics and parameters of batch normalisation that are not those of the start."""
    network = made(name).train()
    for _ in range(2):
        network(images(8))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.bias += torch.randn(module.bias.shape, generator=generator)
    return network.eval()


def silence(network: nn.Module, share: float) -> int:
    """Set a share of the groups of channels to 0: rows, columns, scales and shifts."""
    groups = coupled_channels(network, images())
    chosen = torch.rand(len(groups), generator=torch.Generator().manual_seed(3)) < share
    modules = dict(network.named_modules())
    with torch.no_grad():
        for group in (one for one, dead in zip(groups, chosen, strict=True) if dead):
            for path, numbers in group.inputs.items():
                module = modules[path]
                if getattr(module, "groups", 1) == 1:
                    module.weight[:, numbers] = 0
                elif module.groups < module.in_channels:
                    module.weight[:, [n for n in numbers if n < module.weight.shape[1]]] = 0
    return int(chosen.sum())


@pytest.mark.parametrize("name", NAMES)
def test_a_smaller_network_computes_the_same(name):
    network = trained(name)
    before, keys = networks.count_params(network), list(network.state_dict())
    assert silence(network, 0.4) > 4
    expected = network(images())
    structure = shrink(network, images())
    torch.testing.assert_close(network(images()), expected, rtol=1e-4, atol=1e-5)
    assert networks.count_params(network) < 0.75 * before
    assert list(network.state_dict()) == keys
    again = made(name).eval()
    restructure(again, structure)
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(again(images()), network(images()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mixed", "resnet-lma"])
def test_smaller_networks_still_learn(name):
    network = trained(name)
    silence(network, 0.4)
    shrink(network, images())
    network.train()(images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_network_that_needs_all_its_channels_stays_as_it_is(name):
    network = trained(name)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    expected = network(images())
    assert shrink(network, images()) == {}
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert torch.equal(network(images()), expected)


def test_looking_at_a_network_changes_nothing():
    network = trained("mixed").train()
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    coupled_channels(network, images())
    assert network.training and network.norm.training
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert not [module for module in network.modules() if module._forward_hooks or "forward" in vars(module)]


def test_channels_of_a_residual_stream_go_together_and_start_where_they_were_padded():
    groups = {tuple(group.outputs["stem.0"]): group for group in coupled_channels(made("resnet"), images())}
    first = groups[(0,)]
    assert {path for path in first.outputs if "conv2" in path} == {
        f"stages.{s}.{b}.conv2" for s in range(3) for b in (0, 1)
    }
    assert first.inputs["fc"] == [0]
    others = [group for group in coupled_channels(made("resnet"), images()) if "stages.2.1.conv2" in group.outputs]
    assert sorted(group.outputs["stages.2.1.conv2"][0] for group in others) == list(range(32))
    assert len([group for group in others if "stages.1.0.conv2" in group.outputs]) == 16


def test_one_channel_before_a_linear_layer_is_many_of_its_columns():
    groups = coupled_channels(made("lma_student-lma"), images())
    (group,) = [one for one in groups if one.outputs.get("features.11") == [2]]
    assert group.inputs["classifier.1"] == list(range(32, 48))  # 4 x 4 sites


@pytest.mark.parametrize(("scale", "shift", "goes"), [(0.0, 0.0, True), (0.0, -1.0, True), (0.0, 1.0, False)])
def test_what_batch_normalisation_makes_zero_goes_and_a_constant_stays(scale, shift, goes):
    network = trained("resnet")
    with torch.no_grad():
        network.stages[0][0].bn1.weight[3], network.stages[0][0].bn1.bias[3] = scale, shift
    expected = network(images())
    structure = shrink(network, images())
    torch.testing.assert_close(network(images()), expected, rtol=1e-4, atol=1e-5)
    assert structure == (
        {
            "removed": {
                "stages.0.0.bn1": {"outputs": [3], "inputs": []},
                "stages.0.0.conv1": {"outputs": [3], "inputs": []},
                "stages.0.0.conv2": {"outputs": [], "inputs": [3]},
            }
        }
        if goes
        else {}
    )


def test_what_only_a_dead_channel_reads_goes_too():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 6, 1), nn.Flatten()
    )
    with torch.no_grad():
        network[4].weight[:, 2] = 0
        network[2].weight[[0, 1, 3, 4], 1] = 0  # channel 1 of the first is read by channel 2 of the second alone
    expected = network(images())
    assert shrink(network, images())["removed"] == {
        "0": {"outputs": [1], "inputs": []}, "2": {"outputs": [2], "inputs": [1]}, "4": {"outputs": [], "inputs": [2]},
    }  # fmt: skip
    torch.testing.assert_close(network(images()), expected)


def test_a_layer_keeps_a_channel():
    network = trained("resnet")
    nn.init.zeros_(network.stages[1][0].conv2.weight)
    expected = network(images())
    shrink(network, images())
    assert network.stages[1][0].conv1.out_channels == 1
    torch.testing.assert_close(network(images()), expected, rtol=1e-4, atol=1e-5)


class CountsOnIt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * torch.ones(8, 1, 1)).mean((2, 3))


class Normalises(CountsOnIt):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x))).mean((2, 3))


def test_a_forward_that_counts_on_its_channels_keeps_them_and_says_so(caplog):
    network = CountsOnIt()
    nn.init.zeros_(network.second.weight[:, :3])
    before = copy.deepcopy(network.state_dict())
    with caplog.at_level(logging.WARNING):
        assert shrink(network, images()) == {}
    assert "the network keeps channels that it does not need: its forward counts on them" in caplog.text
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_channels_stay_that_a_normalisation_over_channels_reads():
    network = Normalises()
    nn.init.zeros_(network.second.weight[:, :3])
    assert coupled_channels(network, images()) == []
    assert "removed" not in shrink(network, images())


@pytest.mark.parametrize(("q", "r", "layers"), [(3, 4, 3), (16, 4, 2), (3, 24, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_of_low_rank_becomes_smaller_ones_that_compute_the_same(q, r, layers, stride):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, 3, stride, padding=1)
    with torch.no_grad():
        into, out = torch.randn(16, q), torch.randn(24, r)
        conv.weight.copy_(torch.einsum("or,rqhw,iq->oihw", out, torch.randn(r, q, 3, 3), into))
    network = nn.Sequential(nn.Conv2d(3, 16, 1), conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    expected, before = network(images()), networks.count_macs(network, SHAPE)
    structure = shrink(network, images())
    assert structure == {"factored": {"1": [q, r]}}
    assert len(network[1]) == layers and (network[1].in_channels, network[1].out_channels) == (16, 24)
    torch.testing.assert_close(network(images()), expected, rtol=1e-4, atol=1e-5)
    assert networks.count_macs(network, SHAPE) < before
    again = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 24, 3, stride, padding=1), *network[2:])
    restructure(again, structure)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(images()), network(images()))
