"""Training with rounding: what is deployed computes what was trained, and the training is one like any other."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from small_models import images, rounded, run
from test_quantize_dialects import ACTIVATIONS, SHAPE, SMALL, ZOO, exported
from torch import Tensor, nn

from edgekd import activations, data, distill, networks, registry
from edgekd.activations import multi_segment_layers
from edgekd.errors import DataError, ExportError, MissingError, RecipeError
from edgekd.quantize import account, dialects, placement, ptq, rules
from edgekd.quantize.capture import capture
from edgekd.quantize.graph import Graph, lma_name
from edgekd.quantize.pt2e import ActivationRounding, BranchRange, PerChannelWeightRounding, RoundedNetwork
from edgekd.quantize.qat import QAT
from edgekd.recipe import Augment, Train

CALIBRATION = torch.from_numpy(images(40, shape=(3, 12, 12)))


def small(name: str = "resnet", activation: str = "relu") -> nn.Module:
    """A network of the zoo, untrained."""
    return networks.build(name, SMALL.get(name, {}), SHAPE, 10, ACTIVATIONS[activation], 0)


def export(trained: nn.Module, network: nn.Module, file: Path, continuous: bool = False) -> dict:
    return QAT().export(
        trained, network, file, example=images(1, shape=(3, 12, 12)), opset=20, dynamic_batch=True,
        form=activations.default_form(continuous), metadata={"classes": ["zero"]},
    )  # fmt: skip


def train(network: RoundedNetwork, steps: int = 6) -> None:
    """A few steps, to the end: weights, ranges and statistics move, and then freeze."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    network.train()
    for step in range(steps):
        network.follow(step / steps)
        x = torch.randn(32, 3, 12, 12, generator=generator)
        nn.functional.cross_entropy(network(x), torch.arange(32) % 10).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()


@pytest.mark.parametrize(("name", "activation"), ZOO)
def test_what_is_deployed_computes_what_was_trained(tmp_path, name, activation):
    network = exported(tmp_path / "float.onnx", name, activation).eval()
    post_training = ptq.prepare(tmp_path / "float.onnx", CALIBRATION.numpy())
    prepared = QAT().prepare(network, CALIBRATION)
    before = prepared.ranges()
    train(prepared)
    facts = export(prepared, network, tmp_path / "int8.onnx", activation == "lma continuous")
    model = onnx.load(tmp_path / "int8.onnx")

    # The same placement as that of ptq, from the same ranges.
    assert rules.check(model) == []
    assert facts["pairs"] == len(placement.pairs(post_training.graph))
    assert set(facts["scales"]) == set(placement.pairs(post_training.graph))
    captured, other = placement.roles(prepared.graph), placement.roles(post_training.graph)
    assert captured.keys() == other.keys()
    close = (
        0.05 if activation == "lma" else 1e-4
    )  # next to a cut, the last bit of a sum decides on which side of a jump
    for role, tensor in captured.items():
        assert before[tensor] == pytest.approx(post_training.ranges.largest[other[role]], rel=close), role
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == ["zero"]
    branches = [rounding for rounding in prepared.roundings.values() if isinstance(rounding, BranchRange)]
    scales = sorted(float(branch.largest) / 127 for branch in branches)
    written = json.loads(metadata[placement.BRANCH_SCALES])
    assert sorted(scale for tensor, scale in written.items() if tensor not in facts["scales"]) == pytest.approx(scales)
    assert facts["lma"] == [layer for layer, _ in multi_segment_layers(network)]
    assert {lma_name(node) for node in model.graph.node} - {""} == set(facts["lma"])

    # The same numbers, but for values so close to the middle between two codes that the order of a sum decides.
    x = images(200, 1, (3, 12, 12))
    with torch.no_grad():
        expected = prepared(torch.from_numpy(x)).numpy()
    found = run(model, x)
    # Of noise, by untrained networks: the two largest logits are often close.
    assert np.mean(found.argmax(1) == expected.argmax(1)) >= 0.9
    assert np.median(np.abs(found - expected).max(1)) < 1e-4 * expected.std()
    assert np.array_equal(run(dialects.uint8_from_int8(model), x), found)
    deployed = dialects.onnxruntime_from_int8(model)
    assert account.still_float(post_training.graph, deployed) == []
    arm = dialects.onnxruntime_from_int8(model, activations="int8")
    assert np.array_equal(run(arm, x), run(deployed, x))


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return small("resnet", "lma").eval()


@pytest.fixture(scope="module")
def prepared(student) -> RoundedNetwork:
    return QAT().prepare(student, CALIBRATION)


def test_an_activation_is_rounded_by_its_definition():
    rounding = ActivationRounding(dtype=torch.int8).eval()
    rounding.largest.fill_(2.54)
    x = torch.linspace(-3, 3, 1000, requires_grad=True)
    y = rounding(x)
    y.sum().backward()
    scale = np.float32(2.54) / np.float32(127)
    values = x.detach().numpy()
    assert np.array_equal(y.detach().numpy(), rounded(values, scale))
    kept = np.abs(values) < 127.5 * scale
    assert 0 < kept.sum() < len(values)
    assert np.array_equal(x.grad.numpy(), kept)


def test_rounding_weights_commutes_with_folding_batch_normalisation():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 3, 3, 3)).astype(np.float32)
    weight[4] = 0
    factor = np.array([2, 0.3, -1.7, 1e-3, 5, 0], np.float32).reshape(-1, 1, 1, 1)  # gamma / sigma
    rounding = PerChannelWeightRounding(dtype=torch.int8, ch_axis=0)
    before = rounding(torch.from_numpy(weight)).numpy() * factor
    after = rounding(torch.from_numpy(weight * factor)).numpy()
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-7)
    scale = np.abs(weight[0]).max() / np.float32(127)
    assert np.array_equal(rounding(torch.from_numpy(weight)).numpy()[0], rounded(weight[0], scale))


def test_ranges_are_moving_averages_until_they_freeze():
    rounding = ActivationRounding(dtype=torch.int8)
    rounding.largest.fill_(2.0)
    rounding.train()(torch.tensor([-4.0, 1.0]))
    assert rounding.largest.item() == pytest.approx(0.99 * 2 + 0.01 * 4)
    kept = rounding.largest.clone()
    rounding.frozen = True
    rounding(torch.tensor([9.0]))
    rounding.frozen = False
    rounding.eval()(torch.tensor([9.0]))
    assert torch.equal(rounding.largest, kept)


def test_a_tensor_that_is_always_zero_keeps_the_scale_one():
    rounding = ActivationRounding(dtype=torch.int8).eval()
    assert torch.equal(rounding(torch.zeros(3)), torch.zeros(3))
    assert rounding.scale == 1


def test_freezing_follows_the_progress_of_the_training_alone(prepared):
    norms = [module for module in prepared.modules() if isinstance(module, nn.BatchNorm2d)]
    ranges = [module for module in prepared.modules() if isinstance(module, ActivationRounding)]
    for progress, frozen in ((0.0, False), (0.65, False), (0.66, True), (1.0, True), (0.3, False)):
        prepared.follow(progress)
        for mode in (True, False, True):
            prepared.train(mode)
            assert {norm.training for norm in norms} == {mode and not frozen}
            assert {rounding.frozen for rounding in ranges} == {frozen}
    prepared.eval()


def test_cuts_are_frozen_and_slopes_are_trained(student):
    network = QAT().prepare(student, CALIBRATION)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train(network, 2)
    after = network.state_dict()
    changed = {name.rpartition(".")[2] for name in after if not torch.equal(before[name], after[name])}
    assert {"weight", "running_mean", "slope_deltas", "biases", "largest"} <= changed
    assert not changed & {"running", "num_batches"}
    assert student.state_dict().keys() <= {name.removeprefix("network.") for name in after}


def test_evaluation_changes_nothing_and_dropout_knows_its_mode():
    network = QAT().prepare(small("lma_student"), CALIBRATION)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(network.eval()(CALIBRATION), network(CALIBRATION))
        assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
        assert not torch.equal(network.train()(CALIBRATION), network(CALIBRATION))


def test_a_branch_is_watched_and_not_rounded(prepared):
    branches = [rounding for rounding in prepared.roundings.values() if isinstance(rounding, BranchRange)]
    assert len(branches) == 3  # the residual additions of ResNet-8
    kept = [branch.largest.clone() for branch in branches]
    with torch.no_grad():
        expected = prepared.eval()(CALIBRATION)
        for branch in branches:
            branch.largest.fill_(0.01)
        assert torch.equal(prepared(CALIBRATION), expected)
    for branch, largest in zip(branches, kept, strict=True):
        branch.largest.copy_(largest)


class KilledError(Exception):
    pass


@pytest.mark.slow
def test_an_epoch_with_the_teacher_resumes_to_the_bit_and_keeps_the_accuracy(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(distill, "LOOK_EVERY", 1)
    dataset = data.load("digits", {})
    teacher, student = (
        networks.build("lma_student", {"width": width}, dataset.shape, 10, (activation, {}), 0)
        for width, activation in ((1.0, "relu"), (0.5, "lma"))
    )

    def trained(network: nn.Module, folder: str, *, method: str = "kd", stop: int = 0, **spec) -> nn.Module:
        def on_progress(at: distill.Progress) -> None:
            if at.done == stop:
                raise KilledError

        distill.train(
            network, dataset, Train(**{"batch_size": 64, "warmup": 0, **spec}), registry.create("method", method),
            teacher=teacher if method == "kd" else None, augment=Augment(), seed=0, work=tmp_path / folder,
            on_progress=on_progress,
        )  # fmt: skip
        return network

    trained(teacher, "teacher", method="scratch", epochs=3, lr=0.1)
    trained(student, "student", epochs=4, lr=0.1)
    calibration = torch.from_numpy(dataset.normalize(dataset.train.images[:128]))
    spec = {"epochs": 2, "lr": QAT().lr, "ema": 0.9}
    start = QAT().prepare(student, calibration)
    whole = trained(QAT().prepare(student, calibration), "whole", **spec)
    with pytest.raises(KilledError):
        trained(QAT().prepare(student, calibration), "killed", stop=30, **spec)
    resumed = trained(QAT().prepare(student, calibration), "killed", **spec)
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())

    def top1(network: nn.Module) -> float:
        return dataset.judge("test").score(distill.predict(network, dataset.test, dataset))

    assert top1(whole) >= max(top1(start), top1(student)) - 0.015
    facts = QAT().export(
        whole, student, tmp_path / "int8.onnx", example=calibration[:1].numpy(), opset=20, dynamic_batch=True,
        form="step_gemm", metadata={},
    )  # fmt: skip
    expected = distill.predict(whole, dataset.test, dataset)
    found = run(onnx.load(tmp_path / "int8.onnx"), dataset.normalize(dataset.test.images))
    assert np.mean(found.argmax(1) == expected.argmax(1)) >= 0.999
    assert facts["size_bytes"] == (tmp_path / "int8.onnx").stat().st_size


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 10)


class _InPlace(_Net):
    """Additions and ReLUs that overwrite what they read, as in many published networks."""

    def forward(self, x: Tensor) -> Tensor:
        skip = nn.functional.relu(self.conv(x), inplace=True)
        out = nn.functional.avg_pool2d(skip, 1)
        out += skip
        logits: Tensor = self.fc(nn.functional.relu_(out).mean((2, 3)))
        return logits


class _Branching(_Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc((x if x.sum() > 0 else -x).mean((2, 3)))


class _Tokens(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(2).transpose(1, 2)).mean(1)


def test_operators_that_work_in_place():
    network = _InPlace().eval()
    with torch.no_grad():
        assert torch.equal(capture(network, CALIBRATION[:1]).module(CALIBRATION), network(CALIBRATION))


def test_a_network_that_cannot_be_traced():
    with pytest.raises(ExportError) as caught:
        QAT().prepare(_Branching(), CALIBRATION)
    what, allowed, fix = str(caught.value).splitlines()
    assert what.startswith("error: torch.export cannot trace the network: ")
    assert (
        allowed.strip() == "needed for training with rounding: a forward without branches on data, for any batch size"
    )
    assert fix == (
        "fix:   change the network's forward, or set quantize.method = ptq; the whole report: run with --debug"
    )


def test_a_network_whose_graph_changes_at_export(tmp_path):
    network = _Tokens().eval()
    with pytest.raises(ExportError) as caught:
        export(QAT().prepare(network, CALIBRATION), network, tmp_path / "int8.onnx")
    assert "the exported graph is not the one that was trained with rounding" in str(caught.value)
    assert str(caught.value).splitlines()[2] == "fix:   set quantize.method = ptq"


def test_without_torchao(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else find(name, *a))
    with pytest.raises(MissingError) as caught:
        QAT().prepare(small(), CALIBRATION)
    assert str(caught.value) == (
        "error: QAT needs the Python package 'torchao', which is not installed\n"
        "       it needs: torch, torchao\n"
        "fix:   pip install 'edgekd[qat]'"
    )


def test_bad_options_and_images():
    with pytest.raises(RecipeError) as caught:
        registry.create("quantizer", "qat", options={"freeze": 1.5})
    assert str(caught.value) == (
        "error: quantize.freeze = 1.5 is not a share of the training\n"
        "       allowed: 0 (ranges of the calibration throughout) to 1 (never frozen)\n"
        "fix:   set quantize.freeze = 0.66"
    )
    bad = CALIBRATION.clone()
    bad[3] = torch.nan
    with pytest.raises(DataError, match="calibration image 3 holds NaN or infinity"):
        QAT().prepare(_InPlace(), bad)
    assert QAT().prepare(_InPlace(), CALIBRATION[:8]).notes == [
        "calibrated on 8 images: fewer than 32 rarely show the range of a layer"
    ]


def test_the_captured_graph_has_the_layers_of_the_network(student):
    graph: Graph = capture(student, CALIBRATION[:1]).graph
    weighted = [name for name, module in student.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [layer.name for layer in graph.layers] == weighted
    assert [region.name for region in graph.lma] == [name for name, _ in multi_segment_layers(student)]
