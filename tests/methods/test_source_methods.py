"""Teachers that grow, and teachers that teach each other: against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_pairs import B, attached, cross_entropy, network, pair, softmax, step_of
from torch import nn

from edgekd import registry
from edgekd.errors import RecipeError
from edgekd.methods import Method
from edgekd.networks import Ensemble

COUNT = 3


def kl(teacher: np.ndarray, student: np.ndarray, tau: float) -> float:
    p, q = softmax(teacher / tau), softmax(student / tau)
    return float((p * np.log(p / q)).sum(1).mean())


def answers(networks, x: torch.Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        return [one(x).double().numpy() for one in networks]


def numbers(method: Method, step) -> dict[str, float]:
    return {name: value.item() for name, value in method(step).items()}


@pytest.mark.parametrize(("progress", "phase"), [(0.0, 1), (0.4, 2), (0.99, 3)])
def test_growing_assistant(progress, phase):
    student, teacher = pair()
    method = attached("growing_assistant", student, teacher, groups=3, kd_weight=0.6, ce_weight=0.5, temperature=2.0)
    method.scale.data[:] = torch.tensor([0.5, 0.25])
    step = step_of(method, student, teacher, progress)
    terms, y = numbers(method, step), step.y.numpy()
    parts = zip([0.5, 0.25][: phase - 1], answers(method.groups, step.x), strict=False)
    z = step.student_logits.detach().double().numpy()
    assistant = z + sum(scale * one for scale, one in parts)
    t = step.teacher_logits.double().numpy()
    assert terms == {
        "ce": pytest.approx(0.5 * cross_entropy(z, y), rel=1e-4),
        "kd": pytest.approx(0.6 * 4 * kl(assistant, z, 2.0), rel=1e-3),
        "assistant_ce": pytest.approx(0.5 * cross_entropy(assistant, y), rel=1e-4),
        "assistant_kd": pytest.approx(0.6 * 4 * kl(t, assistant, 2.0), rel=1e-3),
    }
    assert step.recorded["groups"].item() == phase


def test_growing_changes_no_output():
    student, teacher = pair()
    method = attached("growing_assistant", student, teacher).eval()
    x = torch.randn(B, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    z = student.eval()(x).detach()
    assert torch.equal(method.assistant(z, x, 1), z)  # it starts as the student
    for phase in (1, 2, 3):
        before, after = (method.assistant(z, x, number) for number in (phase, phase + 1))
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    # What came in is alive: it gets a gradient through its scale at once, and its weights after that.
    method.assistant(z, x, 4).square().sum().backward()
    assert (method.scale.grad != 0).all()


def test_the_assistant_is_a_constant_where_the_student_learns_from_it():
    student, teacher = pair()
    method = attached("growing_assistant", student, teacher)
    terms = method(step_of(method, student, teacher, 0.9))
    own = torch.autograd.grad(terms["kd"], [*method.parameters()], retain_graph=True, allow_unused=True)
    assert all(grad is None for grad in own)
    learned = torch.autograd.grad(terms["assistant_kd"], [*method.parameters()], allow_unused=True)
    assert all(grad is not None for grad in learned)


def sources() -> tuple[nn.Module, Ensemble]:
    student = network(0.25, 0)
    return student, Ensemble([network(0.375, seed) for seed in (5, 6, 7)], "logits").eval().requires_grad_(False)


def similarities(given: list[np.ndarray], y: np.ndarray, sharpness: float) -> np.ndarray:
    """[S + 1, S]: the student last."""
    rows = [[kl(own, other, 1.0) for other in given] for own in given]
    rows.append([cross_entropy(one, y) for one in given])
    found = np.exp(-np.array(rows) / sharpness)
    found[np.arange(len(given)), np.arange(len(given))] = 0
    return found / found.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("progress", "at", "alone"), [(0.1, 0, False), (0.3, 0, True), (0.5, 1, False), (0.9, 1, True)]
)
def test_mutual_sources(progress, at, alone):
    student, teacher = sources()
    options = {"rounds": 2, "weight": 0.6, "ce_weight": 0.5, "temperature": 2.0, "sharpness": 0.5}
    method = attached("mutual_sources", student, teacher, **options)
    step = step_of(method, student, teacher, progress)
    terms, y = numbers(method, step), step.y.numpy()
    z = [*answers(method.sources, step.x), step.student_logits.detach().double().numpy()]
    weights = similarities(answers(teacher.members, step.x), y, 0.5)
    assert not np.allclose(weights, weights.mean(1, keepdims=True), atol=0.02)
    # The previous selves are asked as they were: the sources as given, and in round 1 all of them.
    previous = answers([one.eval() for one in method.previous], step.x)
    expected = []
    for number, own in enumerate(z):
        if alone and (at or number < COUNT):
            expected.append(kl(previous[number], own, 2.0))
        else:
            expected.append(sum(weights[number, j] * kl(z[j], own, 2.0) for j in range(COUNT) if j != number))
    assert terms == {
        "ce": pytest.approx(0.5 * cross_entropy(z[-1], y), rel=1e-4),
        "kd": pytest.approx(0.6 * 4 * expected[-1], rel=1e-3),
        "sources_ce": pytest.approx(0.5 * sum(cross_entropy(one, y) for one in z[:-1]), rel=1e-4),
        "sources": pytest.approx(0.6 * 4 * sum(expected[:-1]), rel=1e-3),
    }
    found = [step.recorded[f"similarity_{number}"].item() for number in range(COUNT)]
    assert found == pytest.approx(weights[-1], rel=1e-3)


def test_a_round_begins_with_the_selves_of_the_last():
    student, teacher = sources()
    method = attached("mutual_sources", student, teacher, rounds=2)
    x = torch.randn(B, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert np.allclose(answers([one.eval() for one in method.previous[:-1]], x), answers(teacher.members, x))
    with torch.no_grad():
        for parameter in [*method.sources.parameters(), *student.parameters()]:
            parameter += 0.01
    method(step_of(method, student, teacher, 0.3))
    assert not torch.equal(method.previous[-1].fc.weight, student.fc.weight)
    method(step_of(method, student, teacher, 0.6))
    for previous, now in zip(method.previous, (*method.sources, student), strict=True):
        assert torch.equal(previous.fc.weight, now.fc.weight)
    assert not any(parameter.requires_grad for parameter in method.previous.parameters())


def test_distances_are_means_over_the_batches_of_the_training():
    student, teacher = sources()
    method = attached("mutual_sources", student, teacher)
    one = step_of(method, student, teacher)
    method(one)
    first = method.running_distance.clone()
    two = step_of(method, student, teacher)
    two.y = (two.y + 1) % 5
    method(two)
    ce = [np.mean([cross_entropy(z, y.numpy()) for y in (one.y, two.y)]) for z in answers(teacher.members, one.x)]
    np.testing.assert_allclose(method.running_distance[-1], ce, rtol=1e-4)
    torch.testing.assert_close(method.running_distance[:-1], first[:-1])
    method.eval()(two)
    assert method.batches == 2


def test_one_source_and_the_student_teach_each_other():
    student, teacher = pair()
    method = attached("mutual_sources", student, teacher, weight=1.0, temperature=1.0)
    step = step_of(method, student, teacher, 0.1)
    terms = numbers(method, step)
    (source,) = answers(method.sources, step.x)
    z = step.student_logits.detach().double().numpy()
    assert terms["kd"] == pytest.approx(kl(source, z, 1.0), rel=1e-3)
    assert terms["sources"] == pytest.approx(kl(z, source, 1.0), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "option", "allowed", "example"),
    [
        ("growing_assistant", "groups", "2 or more; an assistant of one group does not grow", 4),
        ("mutual_sources", "rounds", "1 or more", 3),
    ],
)
def test_options_that_make_no_sense(name, option, allowed, example):
    value = 1 if option == "groups" else 0
    with pytest.raises(RecipeError) as caught:
        registry.create("method", name, options={option: value})
    assert str(caught.value) == (
        f"error: distill.{option} = {value} is not valid\n"
        f"       expected: {allowed}\n"
        f"fix:   --set distill.{option}={example}"
    )
