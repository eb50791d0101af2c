"""The flow between layers, and what is distilled of it: against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_pairs import B, arrays, attached, cross_entropy, network, one_step, pair, softmax, step_of

from edgekd import registry
from edgekd.errors import RecipeError
from edgekd.methods.flow import flow
from edgekd.networks import Ensemble


def gram(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[B, C, C'] of two square maps, the larger averaged down."""
    side = min(first.shape[2], second.shape[2])

    def down(x: np.ndarray) -> np.ndarray:
        b, c, h, _ = x.shape
        return x.reshape(b, c, side, h // side, side, h // side).mean((3, 5))

    return np.einsum("bmij,bnij->bmn", down(first), down(second)) / side**2


def adapted(method, features: list[np.ndarray]) -> list[np.ndarray]:
    """The student's maps through the adapters, whose statistics are the batch's."""
    made = []
    for adapter, feature in zip(method.adapters, features, strict=True):
        x = np.einsum("dc,bchw->bdhw", adapter[0].weight.detach().double().numpy()[:, :, 0, 0], feature)
        made.append((x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5))
    return made


def distances(method, step, between) -> list[float]:
    student, teacher = adapted(method, arrays(step.student_features)), arrays(step.teacher_features)
    return [((gram(student[i], student[j]) - gram(teacher[i], teacher[j])) ** 2).mean() for i, j in between]


def test_the_flow_of_two_maps():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 3, 8, 8)), rng.normal(size=(2, 5, 4, 4))
    found = flow(torch.from_numpy(first), torch.from_numpy(second))
    np.testing.assert_allclose(found, gram(first, second), rtol=1e-12)


@pytest.mark.parametrize(("progress", "first"), [(0.1, 0.25), (0.249, 0.25)])
def test_cross_layer_matches_all_flows_first(progress, first):
    terms, step, method = one_step("cross_layer", progress=progress, first=first, gram_weight=0.5)
    expected = sum(distances(method, step, [(0, 1), (0, 2), (1, 2)]))
    assert terms == {"gram": pytest.approx(0.5 * expected, rel=1e-3)}


def test_cross_layer_then_distils_every_member_of_an_ensemble():
    student, members = network(0.25, 0), [network(0.375, seed) for seed in (5, 6)]
    teacher = Ensemble(members, "logits").eval().requires_grad_(False)
    method = attached("cross_layer", student, teacher, kd_weight=0.6, ce_weight=0.2, temperature=2.0)
    step = step_of(method, student, teacher, progress=0.25)
    terms = method(step)
    answers = [softmax(member(step.x).double().numpy() / 2) for member in members]
    assert not np.allclose(*answers, atol=1e-2)
    ensemble = np.mean(answers, axis=0)
    q = softmax(step.student_logits.detach().double().numpy() / 2)
    assert terms.keys() == {"ce", "kd"}
    assert terms["kd"].item() == pytest.approx(0.6 * 4 * (ensemble * np.log(ensemble / q)).sum(1).mean(), rel=1e-3)
    assert terms["ce"].item() == pytest.approx(
        0.2 * cross_entropy(step.student_logits.detach().numpy(), step.y.numpy())
    )
    # The flows are those of the first member, and no weights of the ensemble are saved with the method.
    assert method.teacher_taps.paths[:3] == ("members.0.stages.0", "members.0.stages.1", "members.0.stages.2")
    assert not [name for name in method.state_dict() if not name.startswith("adapters")]


def test_cross_layer_of_one_teacher():
    terms, step, _ = one_step("cross_layer", progress=0.5, kd_weight=1.0, temperature=3.0)
    p, q = (softmax(z.detach().double().numpy() / 3) for z in (step.teacher_logits, step.student_logits))
    assert terms["kd"] == pytest.approx(9 * (p * np.log(p / q)).sum(1).mean(), rel=1e-3)


@pytest.mark.parametrize(("reach", "between"), [(1, [(0, 1), (1, 2)]), (2, [(0, 1), (0, 2), (1, 2)])])
def test_dense_flow(reach, between):
    terms, step, method = one_step(
        "dense_flow", reach=reach, euclidean_weight=0.3, adversarial_weight=0.2, ce_weight=0.5
    )
    assert terms["euclidean"] == pytest.approx(0.3 * sum(distances(method, step, between)), rel=1e-3)
    student, teacher = adapted(method, arrays(step.student_features)), arrays(step.teacher_features)
    told, fooled, right = 0.0, 0.0, []
    assert len(method.discriminators) == len(between)
    for judge, (i, j) in zip(method.discriminators, between, strict=True):

        def value(rows: np.ndarray, judge=judge) -> np.ndarray:
            x = rows.reshape(B, -1)
            for layer in judge:
                if hasattr(layer, "weight"):
                    x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
                else:
                    x = np.where(x > 0, x, 0.2 * x)
            return x

        own = 1 / (1 + np.exp(-value(gram(student[i], student[j]))))
        real = 1 / (1 + np.exp(-value(gram(teacher[i], teacher[j]))))
        told += -np.log(1 - own).mean() - np.log(real).mean()
        fooled += -np.log(own).mean()
        right += [own < 0.5, real > 0.5]
    assert terms["discriminators"] == pytest.approx(told, rel=1e-3)
    assert terms["adversarial"] == pytest.approx(0.2 * fooled, rel=1e-3)
    assert step.recorded["discriminator_accuracy"].item() == pytest.approx(np.mean(right))
    assert terms["ce"] == pytest.approx(0.5 * cross_entropy(step.student_logits.detach().numpy(), step.y.numpy()))


def test_the_student_and_the_discriminators_play_against_each_other_only():
    student, teacher = pair()
    method = attached("dense_flow", student, teacher, euclidean_weight=0.0, ce_weight=0.0)
    terms = method(step_of(method, student, teacher))
    judges = list(method.discriminators.parameters())
    against = torch.autograd.grad(
        terms["discriminators"], [*judges, *student.parameters()], retain_graph=True, allow_unused=True
    )
    assert all(grad is not None for grad in against[: len(judges)])
    assert all(grad is None for grad in against[len(judges) :])
    back = torch.autograd.grad(terms["adversarial"], [*judges, *student.parameters()], allow_unused=True)
    assert all(grad is None for grad in back[: len(judges)])
    assert any(grad is not None and grad.abs().sum() > 0 for grad in back[len(judges) :])
    (adam,) = method.optimizers()
    assert {id(p) for group in adam.param_groups for p in group["params"]} == {id(p) for p in judges}
    assert adam.defaults["lr"] == 2e-4


def test_a_copy_of_the_teacher_has_the_teachers_flows():
    teacher = network(0.25, 1).eval().requires_grad_(False)
    student = network(0.25, 1).eval()
    method = attached("dense_flow", student, teacher)
    terms = method(step_of(method, student, teacher))
    assert terms["euclidean"].item() == 0
    assert terms["adversarial"] > 0


def test_one_tap_has_no_flow():
    for name in ("cross_layer", "dense_flow"):
        with pytest.raises(RecipeError) as caught:
            attached(name, *pair(), student_taps=["stages.1"], teacher_taps=["stages.1"])
        assert str(caught.value) == (
            "error: a flow runs between two layers, and 1 is tapped\n"
            "       expected: two module paths or more\n"
            "fix:   name more in distill.student_taps and distill.teacher_taps"
        )


def test_a_first_stage_that_is_all():
    with pytest.raises(RecipeError) as caught:
        registry.create("method", "cross_layer", options={"first": 1.0})
    assert str(caught.value) == (
        "error: distill.first = 1.0 is not valid\n"
        "       expected: a share, at least 0 and below 1\n"
        "fix:   --set distill.first=0.25"
    )
