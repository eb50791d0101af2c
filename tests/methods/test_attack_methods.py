"""Attacks stay in their ball and raise the loss; robust distillation computes its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_pairs import (
    attached,
    cross_entropy,
    digits_for,
    network,
    pair,
    setting,
    softmax,
    step_of,
    student_of,
    teacher_of,
)
from torch.nn import functional as F

from edgekd import data, distill, networks, registry
from edgekd.errors import RecipeError, StageError
from edgekd.methods.attacks import PIXEL, Ball, evaluating, pgd, withstood
from edgekd.recipe import Augment, Train


def ball(epsilon: float = 8.0, step_size: float = 2.0) -> Ball:
    return Ball.of(epsilon, step_size, setting().mean, setting().std)


def images(count: int = 6) -> torch.Tensor:
    """Normalised images whose pixels are on the 0..1 scale, some of them black or white."""
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.rand(count, 1, 8, 8, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    return (pixels - setting().mean) / setting().std


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_an_attack_stays_in_the_ball_and_in_the_image(steps):
    x = images()
    torch.manual_seed(0)
    found = pgd(lambda one: (one * x).sum(), x, ball(), steps)
    pixels, before = (one * setting().std + setting().mean for one in (found, x))
    assert (pixels - before).abs().max() <= 8 * PIXEL + 1e-6
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    assert not found.requires_grad


def test_an_attack_on_a_linear_loss_ends_in_the_corner_of_the_ball():
    x, slope = images(), torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    torch.manual_seed(0)
    found = pgd(lambda one: (one * slope).sum(), x, ball(), 20) * setting().std + setting().mean
    expected = x * setting().std + setting().mean + 8 * PIXEL * slope.sign()
    torch.testing.assert_close(found, expected.clamp(0, 1))


def test_steps_are_signs_of_the_gradient_by_hand():
    student, x = network(0.25, 0).eval(), images()
    y = torch.arange(len(x)) % 5
    torch.manual_seed(0)
    found = pgd(lambda one: F.cross_entropy(student(one), y), x, ball(), 2)
    torch.manual_seed(0)
    std, mean = setting().std.item(), setting().mean.item()
    clean = x.numpy() * std + mean
    now = np.clip(clean + (2 * torch.rand_like(x).numpy() - 1) * 8 / 255, 0, 1)
    for _ in range(2):
        given = torch.tensor((now - mean) / std, dtype=torch.float32, requires_grad=True)
        F.cross_entropy(student(given), y).backward()
        now = np.clip(now + 2 / 255 * np.sign(given.grad.numpy()), clean - 8 / 255, clean + 8 / 255)
        now = np.clip(now, 0, 1)
    np.testing.assert_allclose(found.numpy() * std + mean, now, atol=1e-5)


def test_a_large_attack_leaves_nothing_right():
    torch.manual_seed(0)
    x, y = images(40), torch.arange(40) % 2
    x = x + y.view(-1, 1, 1, 1)  # bright or dark: easily told
    student = network(0.25, 0)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(student(x), y).backward()
        optimizer.step()
    student(x)
    x = ball(0.0).nearest(x, x)
    clean, small, large = (
        withstood(student, x, y, ball(epsilon, max(1, epsilon / 4)), 20).float().mean() for epsilon in (0.0, 4.0, 128.0)
    )
    assert clean > 0.9 and clean >= small >= large
    assert large < 0.1
    assert student.training


def test_an_attack_moves_no_statistics():
    student = network(0.25, 0).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    withstood(student, images(), torch.zeros(6).long(), ball(), 2)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize(("kl_reduction", "tau_squared"), [("mean", True), ("batchmean", True), ("mean", False)])
def test_ard(kl_reduction, tau_squared):
    student, teacher = pair()
    options = {"kd_weight": 0.9, "ce_weight": 0.2, "temperature": 5.0, "steps": 3, "kl_reduction": kl_reduction}
    method = attached("ard", student, teacher, tau_squared=tau_squared, **options)
    step = step_of(method, student, teacher)
    torch.manual_seed(4)
    with evaluating(student):
        attacked = pgd(lambda x: F.cross_entropy(student(x), step.y), step.x, ball(), 3)
    torch.manual_seed(4)
    terms = method(step)
    assert student.training
    student_logits = student(attacked).detach().double().numpy()  # by the batch's statistics, as in training
    p, q = softmax(teacher(step.x).double().numpy() / 5), softmax(student_logits / 5)
    kl = (p * np.log(p / q)).sum(1).mean() / (5 if kl_reduction == "mean" else 1)
    assert terms["kd"].item() == pytest.approx(0.9 * (25 if tau_squared else 1) * kl, rel=1e-3)
    assert terms["ce"].item() == pytest.approx(
        0.2 * cross_entropy(step.student_logits.detach().numpy(), step.y.numpy()), rel=1e-4
    )
    expected = (student_logits.argmax(1) == step.y.numpy()).mean()
    assert step.recorded["accuracy_attacked"].item() == pytest.approx(expected)


def test_fast_ard_attacks_by_the_backward_pass_of_the_training():
    student, teacher = pair()
    method = attached("ard", student, teacher, replays=3, epsilon=6.0, temperature=5.0)
    assert method.replays == 3
    step = step_of(method, student, teacher)
    step.x = images(len(step.x))
    torch.manual_seed(4)
    std, mean = setting().std.item(), setting().mean.item()
    clean = step.x.numpy() * std + mean
    now = np.clip(clean + (2 * torch.rand_like(step.x).numpy() - 1) * 6 / 255, 0, 1)
    torch.manual_seed(4)
    for replay in range(3):
        step.replay = replay
        terms = method(step)
        given = torch.tensor((now - mean) / std, dtype=torch.float32, requires_grad=True)
        p, q = (step.teacher_logits / 5).softmax(1), (student(given) / 5).log_softmax(1)
        kl = 25 * (p * (p.log() - q)).sum(1).mean() / 5
        assert terms["kd"].item() == pytest.approx(kl.item(), rel=1e-3)
        kl.backward()
        student.zero_grad()
        terms["kd"].backward()
        now = np.clip(now + 6 / 255 * np.sign(given.grad.numpy()), clean - 6 / 255, clean + 6 / 255).clip(0, 1)
        # Where the gradient is as good as 0, its sign is rounding.
        off = np.abs(method._next.numpy() * std + mean - now) > 1e-5
        assert off.mean() < 0.01
        now = method._next.numpy() * std + mean
    assert any(parameter.grad.abs().sum() > 0 for parameter in student.parameters())


def test_fast_ard_is_resumed_between_batches_only(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(distill, "LOOK_EVERY", 1)
    digits = data.load("digits", {}, train_limit=100, test_limit=20)

    class Kill(Exception):  # noqa: N818
        pass

    def train(work, die_at: int = 0) -> torch.nn.Module:
        student, teacher = (
            networks.build("resnet", {"depth": 8, "width": 0.25}, digits.shape, 10, ("relu", {}), seed)
            for seed in (0, 1)
        )

        def on_progress(progress: distill.Progress) -> None:
            if progress.done == die_at:
                raise Kill

        distill.train(
            student, digits, Train(epochs=2, batch_size=12, lr=0.02, keep="last"),
            registry.create("method", "ard", options={"replays": 3}), teacher=teacher, augment=Augment(crop=1), seed=0,
            work=work, on_progress=on_progress,
        )  # fmt: skip
        return student

    whole = train(tmp_path / "whole")
    for die_at in (2, 5, 9):  # 7 steps an epoch: the last batch of each is not played to its end
        with pytest.raises(Kill):
            train(tmp_path / "killed", die_at)
    resumed = train(tmp_path / "killed")
    for (name, value), expected in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("replays", [0, 1, -3])
def test_replays_that_are_none(replays):
    with pytest.raises(RecipeError) as caught:
        registry.create("method", "ard", options={"replays": replays})
    assert str(caught.value) == (
        f"error: distill.replays = {replays} is not valid\n"
        "       expected: 2 or more, or null for an attack of its own for every batch\n"
        "fix:   --set distill.replays=8"
    )


def test_a_combination_replays_as_its_parts_do():
    replayed = {"ard": {"replays": 4}}
    method = registry.create("method", "combined", options={"methods": ["kd", replayed]})
    assert method.replays == method.replays_at(0.5) == 4
    staged = registry.create("method", "staged", options={"methods": ["kd", replayed, "kd"], "epochs": [1, 1, 2]})
    assert [staged.replays_at(epoch / 4) for epoch in range(4)] == [1, 4, 1, 1]
    with pytest.raises(RecipeError) as caught:
        registry.create("method", "combined", options={"methods": [replayed, "kd", "dfad"]})
    assert str(caught.value) == (
        "error: distill.methods take every batch more than once, and not as often as each other: ard 4 times,"
        " dfad 5 times\n"
        "       expected: the same number of all that replay batches\n"
        "fix:   give them the same number, or train one after the other: distill.method = staged"
    )


def test_stages_replay_each_their_own_batches(tmp_path):
    """One batch in a row in the first epoch, three in the second."""
    dataset, seen = digits_for("classification"), []
    method = registry.create("method", "staged", options={"methods": ["kd", {"ard": {"replays": 3}}], "epochs": [1, 1]})
    method.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].index.tolist())))
    distill.train(
        student_of("ard", 10), dataset, Train(epochs=2, batch_size=9), method, teacher=teacher_of("ard", 10),
        augment=Augment(), seed=0, work=tmp_path,
    )  # fmt: skip
    first, second = seen[:6], seen[6:]
    assert len(set(first)) == 6 and [len(set(second[at : at + 3])) for at in (0, 3)] == [1, 1] and len(set(second)) == 2


def test_an_epoch_too_short_to_replay_a_batch(tmp_path):
    """The generator of dfad would never move."""
    with pytest.raises(StageError) as caught:
        distill.train(
            student_of("dfad", 10), digits_for("classification"), Train(epochs=1, batch_size=20),
            registry.create("method", "dfad", options={"latent": 8}), teacher=teacher_of("dfad", 10),
            augment=Augment(), seed=0, work=tmp_path,
        )  # fmt: skip
    assert str(caught.value) == (
        "error: the method takes every batch 5 times in a row, and the steps of an epoch are 2\n"
        "       expected: as many steps in an epoch at least\n"
        "fix:   lower train.batch_size or how often the method replays, or give more training samples"
    )
