"""Attacks stay in their ball and raise the loss; robust distillation computes its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_pairs import attached, cross_entropy, network, pair, setting, softmax, step_of
from torch.nn import functional as F

from edgekd.methods.attacks import PIXEL, Ball, evaluating, pgd, robust_accuracy


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
    clean = robust_accuracy(student, x, y, ball(0.0), 1)
    small, large = (robust_accuracy(student, x, y, ball(epsilon, epsilon / 4), 20) for epsilon in (4.0, 128.0))
    assert clean > 0.9 and clean >= small >= large
    assert large < 0.1
    assert student.training


def test_an_attack_moves_no_statistics():
    student = network(0.25, 0).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    robust_accuracy(student, images(), torch.zeros(6).long(), ball(), 2)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize("kl_reduction", ["mean", "batchmean"])
def test_ard(kl_reduction):
    student, teacher = pair()
    options = {"kd_weight": 0.9, "ce_weight": 0.2, "temperature": 5.0, "steps": 3, "kl_reduction": kl_reduction}
    method = attached("ard", student, teacher, **options)
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
    assert terms["kd"].item() == pytest.approx(0.9 * 25 * kl, rel=1e-3)
    assert terms["ce"].item() == pytest.approx(
        0.2 * cross_entropy(step.student_logits.detach().numpy(), step.y.numpy()), rel=1e-4
    )
    expected = (student_logits.argmax(1) == step.y.numpy()).mean()
    assert step.recorded["accuracy_attacked"].item() == pytest.approx(expected)
