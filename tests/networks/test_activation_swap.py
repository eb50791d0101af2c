"""Swapped activations: each call gets its own, nothing else changes, and what cannot be swapped is named."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from plain_networks import PLAIN_NETWORKS
from torch import nn

from edgekd import registry
from edgekd.data import Shape
from edgekd.errors import RecipeError
from edgekd.networks import build, swap_activations
from edgekd.networks.activation_swap import OfLastDimension

ACTIVATIONS = registry.names("activation")


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def x():
    return torch.randn(4, 3, 8, 8)


class Functional(nn.Module):
    """Functions in all spellings, in-place too; dropout as a function; an argument not passed; unused weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc1, self.fc2, self.unused = nn.Linear(4, 6), nn.Linear(6, 10), nn.Linear(2, 2)

    def forward(self, x, mask=None):
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        if mask is not None:
            x = x * mask
        x = torch.relu(x.mean((2, 3))) - 0.2
        x = F.dropout(self.fc1(x.relu()), 0.5, training=self.training)
        x = F.relu(input=x) + F.relu(x, True)
        return self.fc2(F.leaky_relu(x - 0.1, 0.0))


class Shared(nn.Module):
    """One module called twice, on 4 and on 6 channels."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.act(self.conv2(self.act(self.conv1(x)))).mean((2, 3)))


class InPlace(nn.Module):
    """In-place activations whose input is used again, where the in-place change is what the others see."""

    def __init__(self):
        super().__init__()
        self.act, self.conv = nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)
        self.conv2, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 10)

    def forward(self, x):
        y = self.conv(x)
        z = self.conv2(self.act(y))
        w = self.conv2(z)
        w.relu_()
        return self.fc((y + z + w).mean((2, 3)))


class Dynamic(nn.Module):
    """Control flow on values: fx cannot trace it, but its modules can be replaced and its children rewritten."""

    def __init__(self):
        super().__init__()
        self.act, self.twice, self.conv = nn.ReLU(), nn.SiLU(), nn.Conv2d(3, 4, 3)
        self.inner, self.fc = Shared(), nn.Linear(4, 10)

    def forward(self, x):
        h = self.act(self.conv(x))
        if h.sum() > 1e9:
            h = h * 2
        return self.inner(x) + self.fc(F.relu(self.twice(self.twice(h)).mean((2, 3))))


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.seen = nn.Linear(3, 10), None

    def forward(self, x):
        self.seen = x
        return self.fc(F.relu(x.mean((2, 3))))


class OtherInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, x):
        x = F.relu(x.mean((2, 3)))
        return self.fc(x * 2 if self.training else x)


def tree():
    act = nn.ReLU()
    inner = nn.Sequential(nn.Conv2d(4, 5, 3), act)
    return nn.Sequential(nn.Conv2d(3, 4, 3), act, inner, nn.Flatten(), nn.Linear(5 * 16, 10))


REWRITABLE = [Functional, Shared, InPlace, tree]


@pytest.mark.parametrize("make", [*REWRITABLE, Dynamic, Stateful, OtherInTraining])
def test_relu_for_relu_changes_no_output_in_either_mode(make, x):
    network = make()
    reference = copy.deepcopy(network)
    swap_activations(network, "relu", {}, x)
    for mode in (True, False):
        network.train(mode), reference.train(mode)
        torch.manual_seed(3)
        expected = reference(x.clone())
        torch.manual_seed(3)
        assert torch.equal(network(x.clone()), expected)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (Functional, ["leaky_relu", "relu", "relu_1", "relu_2", "relu_3", "relu_4"]),
        (Shared, ["act", "act_1"]),
        (InPlace, ["act", "relu"]),
        (tree, ["1", "2.1"]),
    ],
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_call_gets_an_activation_of_its_own(make, names, activation, x):
    network = make().train()
    others = {key: value.clone() for key, value in network.state_dict().items()}
    report = swap_activations(network, activation, {}, x)
    assert sorted(report.swapped) == names and report.left == {}
    assert all(module.training for module in network.modules())
    assert all(torch.equal(network.state_dict()[key], value) for key, value in others.items())
    modules = [network.get_submodule(name) for name in names]
    assert len(set(modules)) == len(names)
    called = []
    for module in modules:
        module.register_forward_hook(lambda module, *_: called.append(module))
    network(x).sum().backward()
    assert sorted(map(id, called)) == sorted(map(id, modules))
    assert all(parameter.grad is not None for module in modules for parameter in module.parameters())
    assert copy.deepcopy(network).eval()(x).shape == (4, 10)


def test_per_channel_activations_get_the_channels_of_their_call(x):
    network = Shared()
    swap_activations(network, "swish", {}, x)
    assert [network.act.beta.shape, network.act_1.beta.shape] == [(4,), (6,)]


def test_a_rewritten_module_keeps_its_class_methods_and_unused_weights(x):
    network = Functional()
    swap_activations(network, "lma", {"k": 4}, x)
    assert isinstance(network, Functional) and type(network).__name__ == "Functional"
    assert "unused.weight" in network.state_dict()


def test_a_function_asking_for_the_mode_still_asks_at_every_call(x):
    network = Functional()
    swap_activations(network, "prelu", {}, x)
    network.train()
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_what_cannot_be_traced_is_left_with_the_reason(x):
    report = swap_activations(Dynamic(), "prelu", {}, x)
    reason = "torch.fx cannot trace its forward: symbolically traced variables cannot be used as inputs to control flow"
    assert report.left == {"relu()": reason, "twice": reason}
    assert sorted(report.swapped) == ["act", "inner.act", "inner.act_1"]


def test_a_forward_that_keeps_state_is_left_as_it_was(x):
    network = Stateful()
    report = swap_activations(network, "prelu", {}, x)
    assert report.left == {"relu()": "its forward keeps state or makes tensors of its own, which torch.fx would freeze"}
    assert type(network) is Stateful and report.swapped == []
    network(x)
    assert network.seen is x


def test_a_forward_that_is_another_one_in_training_is_left(x):
    report = swap_activations(OtherInTraining(), "prelu", {}, x)
    assert report.left == {"relu()": "its forward is another one in training"}


def test_a_forward_that_a_trace_does_not_reproduce_is_left_as_it_was(x):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.fc = [], nn.Linear(3, 10)

        def forward(self, x):
            self.seen.append(len(self.seen))
            return self.fc(F.relu(x.mean((2, 3)))) * (1 if len(self.seen) < 2 else 2)

    network = Counting()
    report = swap_activations(network, "prelu", {}, x)
    assert report.left == {"relu()": "its forward computes something else when it is traced by torch.fx"}
    assert type(network) is Counting and [*dict(network.named_children())] == ["fc"]


def test_a_function_whose_arguments_are_computed_is_left(x):
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope, self.fc = nn.Parameter(torch.tensor([0.1])), nn.Linear(3, 10)

        def forward(self, x):
            return self.fc(F.prelu(F.relu(x), self.slope).mean((2, 3)))

    network = Computed()
    before = set(network.state_dict())
    report = swap_activations(network, "swish", {}, x)
    reason = "calls prelu with arguments that are computed"
    assert report.left == {"relu()": reason, "prelu()": reason}
    assert set(network.state_dict()) == before and len(list(network.modules())) == 2


def test_a_module_that_the_forward_never_reaches_is_left(x):
    network = tree()
    network[3].register_module("spare", nn.GELU())
    assert swap_activations(network, "relu", {}, x).left == {"3.spare": "the probe never called it"}


def test_a_block_called_on_different_channels_is_left(x):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.conv, self.fc = nn.Sequential(nn.ReLU()), nn.Conv2d(3, 4, 1), nn.Linear(4, 10)

        def forward(self, x):
            return self.fc(self.block(self.conv(self.block(x))).mean((2, 3)))

    assert swap_activations(Pyramid(), "swish", {}, x).left == {"block.0": "is called with 3 and 4 channels"}


def test_behind_a_linear_layer_the_last_dimension_holds_the_channels():
    network = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 5))
    tokens = torch.randn(2, 9, 5)
    swap_activations(network, "swish", {}, tokens)
    assert isinstance(network[1], OfLastDimension) and network[1].activation.beta.shape == (6,)
    hidden = network[0](tokens)
    assert torch.allclose(network(tokens), network[2](hidden * torch.sigmoid(hidden)), atol=1e-6)


def test_the_fast_path_of_a_transformer_layer_does_not_bypass_the_activation():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True).eval()
    tokens = torch.randn(2, 5, 8)
    swap_activations(layer, "swish", {}, tokens)
    with torch.inference_mode():
        fast = layer(tokens)
    assert torch.allclose(fast, layer(tokens), atol=1e-6)


@pytest.mark.parametrize("name", PLAIN_NETWORKS)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "relu"])
def test_every_network_takes_every_activation(name, activation):
    plain = build(name, {}, Shape(1, 8, 8), 10, ("relu", {}), 0)
    network = build(name, {}, Shape(1, 8, 8), 10, (activation, {}), 0)
    count = sum(isinstance(module, nn.ReLU | nn.ReLU6) for module in plain.modules())
    kind = type(registry.create("activation", activation, 3))
    assert sum(isinstance(module, kind) for module in network.modules()) == count
    assert not any(isinstance(module, nn.ReLU | nn.ReLU6) for module in network.modules())
    assert plain.state_dict().keys() <= network.state_dict().keys()


def test_rewritten_networks_can_be_exported(x):
    network = Functional()
    swap_activations(network, "swish", {}, x)
    network.eval()
    exported = torch.export.export(network, (x,)).module()
    assert torch.allclose(exported(x), network(x), atol=1e-6)


def test_unknown_activations_and_options_are_refused_before_anything_changes(x):
    network = Shared()
    for name, options, text in (("lmaa", {}, '"lmaa" is not a known activation'), ("lma", {"kk": 4}, "kk")):
        with pytest.raises(RecipeError, match=text):
            swap_activations(network, name, options, x)
    assert type(network) is Shared and isinstance(network.act, nn.ReLU)
