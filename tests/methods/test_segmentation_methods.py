"""Methods that teach maps: every pixel counts as a sample, and labels are the task's. Against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgekd import registry
from edgekd.methods import Method, Setting, Step
from edgekd.tasks.segmentation import Segmentation

B, K = 3, 4
TASK = Segmentation()


def networks(*sides: int) -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    """Student and teacher for images or volumes, a batch of them, and their labels."""
    torch.manual_seed(0)
    made = nn.Conv2d if len(sides) == 2 else nn.Conv3d
    student, teacher = (nn.Sequential(made(1, K, 3, padding=1)) for _ in range(2))
    return student, teacher.requires_grad_(False), torch.randn(B, 1, *sides), torch.randint(0, K, (B, *sides))


def attached(name: str, student: nn.Module, teacher: nn.Module, x: torch.Tensor, **options) -> Method:
    method: Method = registry.create("method", name, options=options)
    ones = torch.ones(1, *[1] * (x.ndim - 2))
    method.attach(student, teacher, Setting(x, torch.zeros(B), K, 0 * ones, ones, 2, lambda n: x[:n], TASK))
    return method


def step_of(student: nn.Module, teacher: nn.Module, x: torch.Tensor, y: torch.Tensor, progress: float = 0.5) -> Step:
    return Step(
        x, y, progress=progress, student=student, teacher=lambda: teacher(x), ask_teacher=teacher, task=TASK
    )  # fmt: skip


def places(logits: torch.Tensor, tau: float) -> np.ndarray:
    """Softened probabilities [pixels, K]."""
    z = np.moveaxis(logits.detach().double().numpy(), 1, -1).reshape(-1, K) / tau
    exponentials = np.exp(z - z.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def kl(teacher: torch.Tensor, student: torch.Tensor, tau: float) -> float:
    p, q = places(teacher, tau), places(student, tau)
    return float((p * np.log(p / q)).sum(1).mean())


def joint(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """1 - soft Dice with squared sizes, the mean over the classes but background."""
    p, q = places(teacher, 1.0)[:, 1:], places(student, 1.0)[:, 1:]
    return float(1 - ((2 * (p * q).sum(0) + 1) / ((p**2 + q**2).sum(0) + 1)).mean())


@pytest.mark.parametrize("sides", [(6, 5), (3, 4, 5)])
def test_kd_of_every_pixel(sides):
    student, teacher, x, y = networks(*sides)
    method = attached("kd", student, teacher, x, kd_weight=0.6, temperature=2.0)
    terms = method(step_of(student, teacher, x, y))
    assert terms["kd"].item() == pytest.approx(0.6 * 4 * kl(teacher(x), student(x), 2.0), rel=1e-4)
    assert terms["ce"].item() == pytest.approx(0.4 * TASK.loss(student(x), y).item(), rel=1e-5)
    assert terms["joint"].item() == pytest.approx(0.6 * joint(teacher(x), student(x)), rel=1e-4)
    assert TASK.joint_divergence(student(x), student(x)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["kd", "growing_assistant"])
def test_pixels_are_not_softened_unless_the_recipe_says_so(name):
    """With tau 4 the background's logits outweighed the classes: 31 of 62 points of Dice."""
    student, teacher, x, y = networks(6, 5)
    terms = attached(name, student, teacher, x, kd_weight=0.6)(step_of(student, teacher, x, y, 0.0))
    from_teacher = terms.get("assistant_kd", terms["kd"])  # the assistant is the student at first
    assert from_teacher.item() == pytest.approx(0.6 * kl(teacher(x), student(x), 1.0), rel=1e-4)


def test_growing_assistant_of_every_voxel():
    student, teacher, x, y = networks(3, 4, 5)
    method = attached("growing_assistant", student, teacher, x, groups=2, kd_weight=0.6, ce_weight=0.5, temperature=2.0)
    method.scale.data[:] = 0.5
    step = step_of(student, teacher, x, y, 0.75)
    terms = {name: value.item() for name, value in method(step).items()}
    (group,) = method.groups
    assistant = student(x) + 0.5 * group(x)
    assert not torch.allclose(group(x), student(x))
    assert terms == {
        "ce": pytest.approx(0.5 * TASK.loss(student(x), y).item(), rel=1e-5),
        "kd": pytest.approx(0.6 * 4 * kl(assistant, student(x), 2.0), rel=1e-3),
        "assistant_ce": pytest.approx(0.5 * TASK.loss(assistant, y).item(), rel=1e-5),
        "assistant_kd": pytest.approx(0.6 * 4 * kl(teacher(x), assistant, 2.0), rel=1e-3),
        "joint": pytest.approx(0.6 * joint(assistant, student(x)), rel=1e-3),
        "assistant_joint": pytest.approx(0.6 * joint(teacher(x), assistant), rel=1e-3),
    }
    assert step.recorded["assistant_score"].item() == pytest.approx(TASK.batch_score(assistant, y).item())


def test_dfad_of_maps_plays_for_the_logarithm():
    student, teacher, x, y = networks(8, 8)
    method = attached("dfad", student, teacher, x, latent=8, student_steps=1)
    torch.manual_seed(3)
    terms = method(step_of(student, teacher, x, y))
    torch.manual_seed(3)
    images = method.generator(torch.randn(B, 8))
    away = np.abs((student(images) - teacher(images)).detach().double().numpy()).mean()
    assert terms["discrepancy"].item() == pytest.approx(away, rel=1e-4)
    assert terms["generator"].item() == pytest.approx(-np.log(1 + away), rel=1e-4)
