"""Pruning: steps by their closed form, losses by their formula, students that end as small as was asked for."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from method_pairs import attached, cross_entropy, network, one_step, pair, setting, softmax, step_of
from torch import nn

from edgekd import data, distill, export, networks, registry
from edgekd.data import Shape
from edgekd.errors import RecipeError
from edgekd.methods.attacks import Ball, evaluating, pgd
from edgekd.methods.decorrelated_prune import components
from edgekd.methods.pruning import ChannelGroups, SingleWeights, group_factors, soft_threshold
from edgekd.networks.channels import coupled_channels
from edgekd.recipe import Augment, Train

NAMES = ("robust_prune", "decorrelated_prune")


def kl(teacher: np.ndarray, student: np.ndarray, tau: float) -> float:
    p, q = softmax(teacher / tau), softmax(student / tau)
    return float((p * np.log(p / q)).sum(1).mean())


def expected(step, logits, tau=4.0, weight=0.7) -> dict[str, float]:
    teacher = step.teacher_logits.double().numpy()
    ce = (1 - weight) * cross_entropy(logits, step.y.numpy())
    return {"ce": ce, "kd": weight * tau**2 * kl(teacher, logits, tau)}


# --- the operators -----------------------------------------------------------------------------------------------


def test_the_soft_threshold_is_the_proximal_operator_of_the_absolute_value():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 200).astype(np.float32)
    found = soft_threshold(torch.from_numpy(values), 0.3).numpy()
    np.testing.assert_allclose(found, np.sign(values) * np.maximum(np.abs(values) - 0.3, 0), rtol=1e-6)
    # It minimises 0.3 |w| + (w - v)^2 / 2: no neighbour is better.
    for away in (-1e-2, 1e-2):
        better = 0.3 * np.abs(found + away) + (found + away - values) ** 2 / 2
        assert (better >= 0.3 * np.abs(found) + (found - values) ** 2 / 2 - 1e-6).all()


def test_the_group_operator_shrinks_lengths():
    rng = np.random.default_rng(1)
    sizes = [4, 9, 1, 16]
    weights = [rng.normal(0, scale, size) for scale, size in zip((1, 0.05, 0.5, 0.3), sizes, strict=True)]
    norms = np.array([np.linalg.norm(one) for one in weights])
    factors = group_factors(torch.tensor(norms), torch.tensor(sizes, dtype=torch.float64), 0.1).numpy()
    np.testing.assert_allclose(factors, np.maximum(1 - 0.1 * np.sqrt(sizes) / norms, 0), rtol=1e-6)
    assert factors[1] == 0 and factors[0] > 0.8
    assert group_factors(torch.zeros(2), torch.ones(2), 0.1).tolist() == [0, 0]


def test_a_group_is_all_that_belongs_to_a_channel():
    student = network(0.25, 0)
    groups = coupled_channels(student, setting().example)
    number = next(n for n, one in enumerate(groups) if one.outputs.get("stages.1.0.conv1") == [3])
    block = student.stages[1][0]
    parts = [block.conv1.weight[3], block.bn1.weight[3], block.bn1.bias[3], block.conv2.weight[:, 3]]
    found = ChannelGroups(student, setting().example)
    assert found.sizes[number] == sum(part.numel() for part in parts)
    assert found.norms(student)[number].item() == pytest.approx(
        float(np.sqrt(sum((part.detach().double() ** 2).sum().item() for part in parts))), rel=1e-5
    )


def test_a_layer_keeps_its_strongest_channel():
    student = network(0.25, 0)
    groups = ChannelGroups(student, setting().example)
    nn.init.normal_(student.stages[0][0].conv1.weight, std=1e-4)
    kept = groups.strongest(groups.strength(student), 0.9)
    groups.scale(student, kept)
    networks.shrink(student.eval(), setting().example)
    assert all(module.out_channels for module in student.modules() if isinstance(module, nn.Conv2d))
    assert torch.isfinite(student(setting().example)).all()


# --- robust_prune ------------------------------------------------------------------------------------------------


def test_robust_prune_computes_its_formula_under_attack():
    found, _, method = one_step("robust_prune", steps=2, epsilon=16.0, step_size=4.0)
    student, teacher = pair()
    step = step_of(method, student, teacher)
    student(step.x)  # moves the statistics that the attack sees
    ball = Ball.of(16.0, 4.0, setting().mean, setting().std)
    torch.manual_seed(4)
    with evaluating(student):
        attacked = pgd(lambda x: nn.functional.cross_entropy(student(x), step.y), step.x, ball, 2)
    logits = student(attacked).detach().double().numpy()
    assert found == pytest.approx(expected(step, logits), rel=1e-4)


def test_without_an_attack_it_is_distillation():
    found, step, _ = one_step("robust_prune", steps=0, kd_weight=0.4, temperature=2.0)
    logits = step.student_logits.detach().double().numpy()
    assert found == pytest.approx(expected(step, logits, 2.0, 0.4), rel=1e-4)


def test_single_weights_take_proximal_steps():
    student, teacher = pair()
    method = attached("robust_prune", student, teacher, prune="weights", penalty={"linear": [0.2, 0.4]})
    before = copy.deepcopy(student)
    method.constrain(student, step_size=0.1, progress=0.5)
    for (name, weight), old in zip(student.named_parameters(), before.parameters(), strict=True):
        old = old.detach().numpy()
        shrunk = np.sign(old) * np.maximum(np.abs(old) - 0.1 * 0.3, 0) if old.ndim > 1 else old
        np.testing.assert_allclose(weight.detach().numpy(), shrunk, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("prune", ["channels", "weights"])
def test_what_has_made_no_step_is_not_shrunk(prune):
    student, teacher = pair()
    method = attached("robust_prune", student, teacher, prune=prune)
    before = copy.deepcopy(student.state_dict())
    method.constrain(student, step_size=0.0, progress=0.1)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize(("prune", "sparsity"), [("channels", 0.5), ("weights", 0.9)])
def test_debiasing_leaves_the_share_that_was_asked_for(prune, sparsity):
    student, teacher = pair()
    method = attached("robust_prune", student, teacher, prune=prune, sparsity=sparsity, debias=0.5)
    method.constrain(student, step_size=0.1, progress=0.5)
    groups = ChannelGroups(student, setting().example) if prune == "channels" else SingleWeights(student)
    zero = groups.strength(student) == 0
    assert zero.float().mean().item() == pytest.approx(sparsity, abs=0.02)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1
    method.constrain(student, step_size=0.1, progress=0.7)
    assert torch.equal(groups.strength(student) == 0, zero)


# --- decorrelated_prune ------------------------------------------------------------------------------------------


def pruned(macs: float) -> tuple[nn.Module, nn.Module, nn.Module, list[np.ndarray]]:
    """The student before and after its pruning, the method, and the outputs of a convolution [B sites, C]."""
    student, teacher = network(0.5, 0), pair()[1]
    method = attached("decorrelated_prune", student, teacher, macs=macs)
    outputs: list[np.ndarray] = []
    step = step_of(method, student, teacher, 0.45)
    student.eval()
    hook = student.stages[1][0].conv2.register_forward_hook(
        lambda _, x, y: outputs.append(y.detach().double().movedim(1, -1).flatten(0, -2).numpy())
    )
    student(step.x)
    hook.remove()
    student.train()
    method(step)
    before = copy.deepcopy(student)
    method.constrain(student, step_size=0.1, progress=0.5)
    return before.eval(), student.eval(), method, outputs


def test_decorrelated_prune_computes_its_formula():
    found, step, _ = one_step("decorrelated_prune")
    assert found == pytest.approx(expected(step, step.student_logits.detach().double().numpy()), rel=1e-4)


def test_components_are_the_largest_that_reach_the_share():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert [components(values, share) for share in (0.0, 0.4, 0.41, 0.7, 0.71, 0.95, 1.0)] == [1, 1, 2, 2, 3, 4, 4]


def test_the_components_are_not_correlated_and_the_largest_are_kept():
    before, after, method, (outputs,) = pruned(0.5)
    number = list(method._convs).index("stages.1.0.conv2")
    projection = method.get_buffer(f"out_projection_{number}").double().numpy()
    rank = round(np.trace(projection))
    covariance = np.cov(outputs.T, bias=True)
    _, vectors = np.linalg.eigh(covariance)
    assert 0 < rank < len(projection)
    np.testing.assert_allclose(projection, vectors[:, -rank:] @ vectors[:, -rank:].T, atol=1e-3)
    rotated = np.cov((outputs @ vectors).T, bias=True)
    assert np.abs(rotated - np.diag(np.diag(rotated))).max() < 1e-8 * np.diag(rotated).max()
    weight = after.stages[1][0].conv2.weight.detach().double().numpy()
    into = method.get_buffer(f"in_projection_{number}").double().numpy()
    old = before.stages[1][0].conv2.weight.detach().double().numpy()
    np.testing.assert_allclose(weight, np.einsum("po,oihw,iq->pqhw", projection, old, into), atol=1e-5)


def test_all_components_are_the_student_itself():
    student, teacher = network(0.5, 0).eval(), pair()[1]
    method, x = attached("decorrelated_prune", student, teacher), setting().example
    expected, before = student(x), copy.deepcopy(student.state_dict())
    # U_r U_r^T of all components of each side, as the pruning would make it if it kept them.
    for number, conv in enumerate(method._convs.values()):
        for side, channels in (("in", conv.in_channels), ("out", conv.out_channels)):
            vectors, _ = torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(7)))
            method.get_buffer(f"{side}_projection_{number}").copy_(vectors @ vectors.T)
    method.decided.fill_(1)
    method.constrain(student, step_size=0.1, progress=0.9)
    assert any(not torch.equal(value, before[key]) for key, value in student.state_dict().items())
    torch.testing.assert_close(student(x), expected, rtol=1e-5, atol=1e-5)
    assert networks.shrink(student, x) == {}


@pytest.mark.parametrize("macs", [0.3, 0.6])
def test_the_student_ends_with_the_multiplications_that_were_asked_for(macs):
    before, after, *_ = pruned(macs)
    expected_logits = after(setting().example)
    structure = networks.shrink(after, setting().example)
    assert structure["factored"]
    torch.testing.assert_close(after(setting().example), expected_logits, rtol=1e-4, atol=1e-4)
    share = networks.count_macs(after, Shape(1, 8, 8)) / networks.count_macs(before, Shape(1, 8, 8))
    assert macs - 0.15 < share <= macs + 0.01


def test_the_mean_of_what_is_dropped_goes_into_the_bias():
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Conv2d(1, 12, 1), nn.Conv2d(12, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    )
    method = attached("decorrelated_prune", student, pair()[1], macs=0.5)
    step = step_of(method, student, pair()[1], 0.45)
    method(step)
    means = []
    hook = student[1].register_forward_hook(lambda _, x, y: means.append(y.mean((0, 2, 3))))
    student(step.x)
    method.constrain(student, step_size=0.1, progress=0.5)
    student(step.x)
    hook.remove()
    torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-4)
    assert torch.linalg.matrix_rank(student[1].weight[:, :, 0, 0]) < 12


# --- in a training -----------------------------------------------------------------------------------------------


def trained(name: str, work: Path) -> nn.Module:
    digits = data.load("digits", {}, train_limit=60, test_limit=20)
    student, teacher = (
        networks.build("resnet", {"depth": 8, "width": width}, digits.shape, 10, ("relu", {}), 0)
        for width in (0.5, 0.25)
    )
    options = {"steps": 1, "sparsity": 0.6} if name == "robust_prune" else {"macs": 0.4}
    method = registry.create("method", name, options=options)
    budget = Train(epochs=4, batch_size=12, lr=0.02, ema=0.9, keep="best")
    distill.train(student, digits, budget, method, teacher=teacher, augment=Augment(crop=1), seed=0, work=work)
    return student


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_student_is_smaller_in_onnx(name, tmp_path):
    """The moving average of the weights is pruned, and no epoch from before the pruning is kept."""
    student = trained(name, tmp_path / "work")
    x = torch.randn(2, 1, 8, 8)
    sizes = []
    for file in (tmp_path / "whole.onnx", tmp_path / "small.onnx"):
        export.export(student, file, example=x[:1].numpy(), opset=20, form="where", dynamic_batch=False, metadata={})
        weights = onnx.load(file).graph.initializer
        sizes.append(sum(int(np.prod(weight.dims)) for weight in weights))
        networks.shrink(student, x)
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_quantizer_trains_the_smaller_student_by_plain_distillation(name):
    method = registry.create("method", name, options={"temperature": 3.0}).finetuning()
    assert type(method).__name__ == "KD" and method.temperature == 3.0
    combined = registry.create("method", "combined", options={"methods": [name, "rkd"]}).finetuning()
    assert [type(part).__name__ for _, part in combined.named_parts()] == ["KD", "RKD"]


def test_stages_leave_a_quantizer_to_the_last_and_tell_each_its_own_epochs():
    methods = [{"domain_kd": {}}, {"robust_prune": {"temperature": 3.0}}]
    method = registry.create("method", "staged", options={"methods": methods, "epochs": [1, 3]})
    student, teacher = pair()
    method.attach(student, teacher, setting(4))
    assert method.parts["domain_kd"].epochs == 1
    last = method.finetuning()
    assert type(last).__name__ == "KD" and last.temperature == 3.0


def test_a_student_is_ready_when_it_is_pruned_and_not_before():
    """With one batch before `prune_at` nothing has been seen by then."""
    student, teacher = pair()
    method = attached("decorrelated_prune", student, teacher)
    assert method.ready == 1.0
    method.constrain(student, step_size=0.1, progress=0.5)
    assert method.ready == 1.0
    method(step_of(method, student, teacher, 0.5))
    method.constrain(student, step_size=0.1, progress=1.0)
    assert method.ready == 0.5


def test_stages_constrain_in_turn_and_what_was_pruned_stays():
    student, teacher = pair()
    options = {
        "methods": ["kd", {"robust_prune": {"prune": "weights", "penalty": 1.0, "steps": 0}}, "kd"],
        "epochs": [1, 2, 1],
    }
    method = registry.create("method", "staged", options=options)
    method.attach(student, teacher, setting(4))
    assert method.ready == pytest.approx(0.25 + 0.6 * 0.5)
    before = student.fc.weight.detach().clone()
    method.constrain(student, step_size=0.01, progress=0.25)
    assert torch.equal(student.fc.weight, before)
    method.constrain(student, step_size=0.01, progress=0.3)
    torch.testing.assert_close(student.fc.weight, soft_threshold(before, 0.01))
    method.constrain(student, step_size=0.01, progress=0.6)
    zero = student.fc.weight == 0
    with torch.no_grad():
        student.fc.weight += 1
    method.constrain(student, step_size=0.01, progress=1.0)
    assert torch.equal(student.fc.weight == 0, zero) and zero.any()


# --- what cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("robust_prune", {"sparsity": 1.0}, "error: distill.sparsity = 1.0 is not valid\n"
         "       expected: a share, at least 0 and below 1\nfix:   --set distill.sparsity=0.5"),
        ("robust_prune", {"debias": -0.1}, "error: distill.debias = -0.1 is not valid"),
        ("robust_prune", {"penalty": -1.0}, "error: distill.penalty = -1.0 is not valid"),
        ("decorrelated_prune", {"macs": 0.0}, "error: distill.macs = 0 is not valid\n"
         "       expected: a share, above 0 and below 1\nfix:   --set distill.macs=0.5"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(name, options, message):
    with pytest.raises(RecipeError) as caught:
        registry.create("method", name, options=options, where="distill")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("robust_prune", "error: the student has no channels that could be removed\n"
         "       a channel goes when no layer but convolutions, linear layers and batch normalisation read it\n"
         "fix:   set distill.prune = weights, or use another student"),
        ("decorrelated_prune", "error: the student has no convolution that could be pruned\n"
         "       needed: two-dimensional convolutions in one group, padded with zeros or not at all\n"
         "fix:   use another student, or another distill.method"),
    ],
)  # fmt: skip
def test_a_student_that_cannot_be_pruned(name, message):
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(RecipeError) as caught:
        attached(name, student, pair()[1])
    assert str(caught.value) == message
