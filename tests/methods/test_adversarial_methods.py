"""Attentions under a discriminator, and samples at the teacher's boundary: against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_pairs import B, K, arrays, attached, cross_entropy, network, one_step, pair, softmax, step_of
from torch import nn

from edgekd.errors import RecipeError
from edgekd.methods.attacks import boundary
from edgekd.methods.bss import base_samples, similarity
from edgekd.methods.generators import generator


def linear(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    return x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()


def mlp(layers: nn.Module, x: np.ndarray) -> np.ndarray:
    for layer in layers:
        x = linear(layer, x) if hasattr(layer, "weight") else np.where(x > 0, x, 0.2 * x)
    return x


def soft_cross_entropy(teacher: np.ndarray, student: np.ndarray, tau: float) -> float:
    return float(-(softmax(teacher / tau) * np.log(softmax(student / tau))).sum(1).mean())


def answers(step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return step.teacher_logits.double().numpy(), step.student_logits.detach().double().numpy(), step.y.numpy()


def test_squeezed_adversarial():
    options = {"attention_weight": 2.0, "adversarial_weight": 0.3, "kd_weight": 0.6, "ce_weight": 0.5}
    terms, step, method = one_step("squeezed_adversarial", **options, temperature=2.0)
    teacher, student, y = answers(step)
    away, tasks = 0.0, 0.0
    levels = zip(arrays(step.student_features), arrays(step.teacher_features), strict=True)
    for level, maps in enumerate(levels):
        seen = []
        for heads, feature in zip((method.student_heads, method.teacher_heads), maps, strict=True):
            rows = heads[level].weight.detach().double().numpy()[y]
            one = np.maximum(np.einsum("bc,bchw->bhw", rows, feature), 0).reshape(B, -1)
            seen.append(one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-12))
            tasks += cross_entropy(linear(heads[level], feature.mean((2, 3))), y)
        away += ((seen[0] - seen[1]) ** 2).sum(1).mean()
    own, real = (mlp(method.judge, z) for z in (student, teacher))
    of_student, of_teacher = (1 / (1 + np.exp(-one[:, 0])) for one in (own, real))
    p, q = softmax(teacher / 2), softmax(student / 2)
    assert terms["attention"] == pytest.approx(2.0 * away, rel=1e-3)
    assert terms["heads"] == pytest.approx(tasks, rel=1e-4)
    assert terms["adversarial"] == pytest.approx(-0.3 * np.log(of_student).mean(), rel=1e-4)
    told = -np.log(1 - of_student).mean() - np.log(of_teacher).mean()
    classes = sum(cross_entropy(one[:, 1:], y) for one in (own, real))
    assert terms["discriminator"] == pytest.approx(told + classes, rel=1e-4)
    assert terms["kd"] == pytest.approx(0.6 * 4 * (p * np.log(p / q)).sum(1).mean(), rel=1e-3)
    assert terms["ce"] == pytest.approx(0.5 * cross_entropy(student, y), rel=1e-4)
    right = np.concatenate((of_student < 0.5, of_teacher > 0.5))
    assert step.recorded["discriminator_accuracy"].item() == pytest.approx(right.mean())


def test_attention_is_grad_cam_of_the_level_s_head():
    """The gradient of the label's score by the map, averaged over the sites, weighs the channels."""
    _, step, method = one_step("squeezed_adversarial")
    head, feature = method.student_heads[1], step.student_features["stages.1"].detach().requires_grad_()
    head(feature.mean((2, 3))).gather(1, step.y[:, None]).sum().backward()
    sites = feature.shape[2] * feature.shape[3]
    weights = feature.grad.mean((2, 3)) * sites
    torch.testing.assert_close(weights, head.weight.detach()[step.y])


def test_every_part_learns_from_its_own_term_alone():
    student, teacher = pair()
    method = attached("squeezed_adversarial", student, teacher)
    terms = method(step_of(method, student, teacher))
    judges, heads = list(method.judge.parameters()), [*method.student_heads.parameters()]
    heads += method.teacher_heads.parameters()
    everything = [*judges, *heads, *student.parameters()]

    def reached(term: str) -> set[str]:
        found = torch.autograd.grad(terms[term], everything, retain_graph=True, allow_unused=True)
        parts = ["judge"] * len(judges) + ["heads"] * len(heads) + ["student"] * len(list(student.parameters()))
        return {part for part, gradient in zip(parts, found, strict=True) if gradient is not None}

    assert reached("discriminator") == {"judge"}
    assert reached("heads") == {"heads"}
    assert reached("attention") == reached("adversarial") == reached("kd") == {"student"}
    (adam,) = method.optimizers()
    assert {id(p) for group in adam.param_groups for p in group["params"]} == {id(p) for p in judges}


def test_a_copy_of_the_teacher_looks_where_the_teacher_looks():
    teacher = network(0.25, 1).eval().requires_grad_(False)
    student = network(0.25, 1).eval()
    method = attached("squeezed_adversarial", student, teacher)
    method.student_heads.load_state_dict(method.teacher_heads.state_dict())
    terms = method(step_of(method, student, teacher))
    assert terms["attention"].item() == pytest.approx(0, abs=1e-10)
    assert terms["kd"].item() == pytest.approx(0, abs=1e-6)


WIDE = {"lowest": torch.full((1, 1, 1), -9.0), "highest": torch.full((1, 1, 1), 9.0)}


class Flat(nn.Module):
    """Logits that are linear in the pixels: the way to a boundary is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(K, 64, generator=torch.Generator().manual_seed(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight.T


def test_the_way_to_the_boundary_by_hand():
    flat, x = Flat(), torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = flat(x).argmax(1)
    target = (y + 2) % K
    found, turned = boundary(flat, x, y, target, **WIDE, step_size=0.3, steps=4)
    weight, expected = flat.weight.double().numpy(), []
    for image, of, to in zip(x.double().numpy().reshape(6, -1), y, target, strict=True):
        gradient = weight[of] - weight[to]
        for _ in range(4):
            logits = weight @ image
            if logits.argmax() != of:
                break
            image = image - 0.3 * (logits[of] - logits[to] + 1e-4) * gradient / np.linalg.norm(gradient)
        expected.append(image)
    np.testing.assert_allclose(found.numpy().reshape(6, -1), expected, rtol=1e-4, atol=1e-5)
    assert turned.tolist() == [(weight @ one).argmax() != of for one, of in zip(expected, y, strict=True)]
    assert turned.any()


def test_boundary_samples_are_images_and_those_that_turned_stay():
    flat, x = Flat(), torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = (flat(x).argmax(1) + 1) % K  # not of this class: turned before the first step
    low, high = torch.full((1, 1, 1), -0.5), torch.full((1, 1, 1), 0.5)
    found, turned = boundary(flat, x, y, (y + 1) % K, **WIDE, step_size=0.3, steps=3)
    assert turned.all() and torch.equal(found, x)
    found, _ = boundary(flat, x, y, (y + 1) % K, low, high, step_size=0.3, steps=1)
    assert found.min() >= -0.5 and found.max() <= 0.5


def test_base_samples_are_told_right_by_both_and_differ_most():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 60, K, generator=generator)
    y = teacher.argmax(1)
    both = np.flatnonzero((student.argmax(1) == y).numpy())
    p, q = softmax(teacher.numpy()), softmax(student.numpy())
    squares = ((p - q) ** 2).sum(1) - ((p - q)[np.arange(60), y] ** 2)
    expected = both[np.argsort(-squares[both])]
    assert len(both) > 3
    assert base_samples(teacher, student, y, 64).tolist() == expected.tolist()
    assert base_samples(teacher, student, y, 3).tolist() == expected[:3].tolist()
    assert base_samples(teacher, student, (y + 1) % K, 3).tolist() == []


def test_bss():
    student, teacher = network(0.375, 1), network(0.375, 1).eval().requires_grad_(False)
    options = {"kd_weight": 1.5, "boundary_weight": 0.7, "ce_weight": 0.5, "temperature": 2.0, "step_size": 0.5}
    method = attached("bss", student, teacher, **options)
    step = step_of(method, student, teacher)
    step.y = teacher(step.x).argmax(1)
    torch.manual_seed(4)
    terms = {name: value.item() for name, value in method(step).items()}
    teachers, students, y = answers(step)
    chosen = base_samples(step.teacher_logits, step.student_logits.detach(), step.y, 64)
    assert 2 <= len(chosen) <= B
    torch.manual_seed(4)
    share = softmax(teachers)[chosen]
    share[np.arange(len(chosen)), y[chosen]] = 0
    target = torch.multinomial(torch.tensor(share / share.sum(1, keepdims=True), dtype=torch.float32), 1)[:, 0]
    x, of = step.x[chosen], step.y[chosen]
    attacked, turned = boundary(teacher, x, of, target, method.lowest, method.highest, 0.5, 10)
    at = [one(attacked).detach().double().numpy() for one in (teacher, student)]
    assert terms["boundary"] == pytest.approx(0.7 * soft_cross_entropy(*at, 2.0), rel=1e-3)
    assert terms["kd"] == pytest.approx(1.5 * soft_cross_entropy(teachers, students, 2.0), rel=1e-4)
    assert terms["ce"] == pytest.approx(0.5 * cross_entropy(students, y), rel=1e-4)
    assert step.recorded["boundary_turned"].item() == pytest.approx(turned.float().mean().item())
    # The student is the teacher, but for the batch's statistics, and it is attacked without them.
    assert step.recorded["magsim"].item() > 0 and abs(step.recorded["angsim"].item()) <= 1


def test_bss_without_samples_to_attack():
    student, teacher = pair()
    method = attached("bss", student, teacher)
    step = step_of(method, student, teacher)
    step.y = (teacher(step.x).argmax(1) + 1) % K
    terms = method(step)
    assert terms["boundary"].item() == 0 and terms["kd"] > 0
    assert {name: value.item() for name, value in step.recorded.items()} == dict.fromkeys(
        ("boundary_turned", "magsim", "angsim"), 0.0
    )
    late = step.at(0.9)  # the schedule's last quarter
    late.recorded = {}
    assert method(late)["boundary"].item() == 0 and not late.recorded


def test_similarity_of_changes():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 4, 1, 3, 3))
    second[3] = 0
    u, v = first.reshape(4, -1), second.reshape(4, -1)
    lengths = np.linalg.norm(u, axis=1), np.linalg.norm(v, axis=1)
    magnitude, angle = similarity(torch.from_numpy(first), torch.from_numpy(second))
    assert magnitude.item() == pytest.approx((np.minimum(*lengths) / np.maximum(*lengths)).mean())
    cosines = (u * v)[:3].sum(1) / lengths[0][:3] / lengths[1][:3]
    assert angle.item() == pytest.approx(cosines.sum() / 4, rel=1e-5)
    same = similarity(torch.from_numpy(first), torch.from_numpy(2 * first))
    assert [one.item() for one in same] == pytest.approx([0.5, 1.0])


def after(count: int, step, method) -> dict[str, float]:
    """The terms of the step that is taken when the batch was taken `count` times before, from the same noise."""
    step.replay, step.recorded = count, {}
    torch.manual_seed(7)
    return method(step)


def test_dfad():
    student, teacher = pair()
    method = attached("dfad", student, teacher, student_steps=3, latent=16, weight=2.0)
    assert method.replays == 3 and not method.needs_images
    step = step_of(method, student, teacher)
    torch.manual_seed(7)
    images = method.generator(torch.randn(B, 16))
    assert images.shape == step.x.shape
    of_student, of_teacher = (one(images).detach().double().numpy() for one in (student, teacher))
    away = np.abs(of_student - of_teacher).mean()
    terms = after(0, step, method)
    assert terms.keys() == {"discrepancy"}
    assert terms["discrepancy"].item() == pytest.approx(2.0 * away, rel=1e-4)
    terms = after(2, step, method)
    assert terms["discrepancy"].item() == pytest.approx(2.0 * away, rel=1e-4)
    assert terms["generator"].item() == pytest.approx(-away, rel=1e-4)
    agreement = (of_student.argmax(1) == of_teacher.argmax(1)).mean()
    assert step.recorded["agreement"].item() == pytest.approx(agreement)


def test_the_student_and_the_generator_play_against_each_other_only():
    student, teacher = pair()
    method = attached("dfad", student, teacher, student_steps=1, latent=16)
    terms = after(0, step_of(method, student, teacher), method)
    made, learned = list(method.generator.parameters()), list(student.parameters())
    of_student = torch.autograd.grad(terms["discrepancy"], [*made, *learned], retain_graph=True, allow_unused=True)
    of_generator = torch.autograd.grad(terms["generator"], [*made, *learned], allow_unused=True)
    assert all(gradient is None for gradient in of_student[: len(made)])
    assert all(gradient is not None for gradient in of_student[len(made) :])
    assert all(gradient is not None for gradient in of_generator[: len(made)])
    assert all(gradient is None for gradient in of_generator[len(made) :])
    assert all(parameter.grad is None for parameter in teacher.parameters())
    (adam,) = method.optimizers()
    assert {id(p) for group in adam.param_groups for p in group["params"]} == {id(p) for p in made}


def test_the_generators_learning_rate_follows_its_schedule():
    student, teacher = pair()
    method = attached("dfad", student, teacher, student_steps=1, latent=16, generator_lr={"linear": [0.1, 0.02, 0.5]})
    (adam,) = method.optimizers()
    method(step_of(method, student, teacher, 0.25))
    assert adam.param_groups[0]["lr"] == pytest.approx(0.06)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 28), (3, 48, 64)])
def test_generated_images_are_normalised(shape):
    torch.manual_seed(0)
    images = generator(5, shape)(torch.randn(6, 5))
    assert images.shape == (6, *shape)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(shape[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(shape[0]), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("shape", "size", "nearest"),
    [((3, 30, 32), "30x32", "32x32"), ((1, 40, 64), "40x64", "32x64"), ((1, 8, 8, 8), "8x8x8", "8x8")],
)
def test_images_that_no_generator_makes(shape, size, nearest):
    with pytest.raises(RecipeError) as caught:
        generator(5, shape)
    assert str(caught.value) == (
        f"error: the generator of dfad cannot make images of {size} pixels\n"
        "       expected: two sides that are multiples of 4, beyond 32 pixels of 16: it doubles them\n"
        f"fix:   use a teacher for images of {nearest} pixels, or another method"
    )
