"""What a method sees of a step; `kd` and `scratch` compute their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgekd import registry
from edgekd.errors import RecipeError
from edgekd.methods import Step

B, K = 12, 5


@pytest.fixture
def logits():
    """Teacher's and student's, float32 [B, K], and labels [B]."""
    rng = np.random.default_rng(0)
    teacher, student = (rng.normal(0, 3, (B, K)).astype(np.float32) for _ in range(2))
    return teacher, student, rng.integers(0, K, B)


def step(teacher, student, labels) -> Step:
    x = torch.from_numpy(student).requires_grad_()
    return Step(
        x, torch.from_numpy(labels), progress=0.5, student=lambda x: x * 1.0, teacher=lambda: torch.from_numpy(teacher)
    )


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(softmax(logits)[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
@pytest.mark.parametrize("tau_squared", [True, False])
@pytest.mark.parametrize("kl_reduction", ["batchmean", "mean"])
@pytest.mark.parametrize(("kd_weight", "ce_weight"), [(0.7, None), (0.7, 1.0), (1.0, 0.0), (0.0, None), (3.0, 0.25)])
def test_kd_computes_its_formula(logits, temperature, tau_squared, kl_reduction, kd_weight, ce_weight):
    teacher, student, labels = logits
    options = {"kd_weight": kd_weight, "ce_weight": ce_weight, "temperature": temperature, "tau_squared": tau_squared,
               "kl_reduction": kl_reduction}  # fmt: skip
    terms = registry.create("method", "kd", options=options)(step(teacher, student, labels))
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    kl = (p * np.log(p / q)).sum() / (B if kl_reduction == "batchmean" else B * K)
    expected_kd = kd_weight * kl * (temperature**2 if tau_squared else 1)
    expected_ce = (1 - kd_weight if ce_weight is None else ce_weight) * cross_entropy(student, labels)
    assert terms.keys() == {"ce", "kd"}
    assert terms["kd"].item() == pytest.approx(expected_kd, rel=1e-5)
    assert terms["ce"].item() == pytest.approx(expected_ce, rel=1e-5)


def test_kd_has_the_gradient_of_its_formula(logits):
    """tau^2 KL: tau (q - p) / B for each sample; cross-entropy: (softmax - one-hot) / B."""
    teacher, student, labels = logits
    batch = step(teacher, student, labels)
    sum(registry.create("method", "kd", options={"temperature": 3.0, "kd_weight": 0.6})(batch).values()).backward()
    softened = 3.0 * (softmax(student / 3.0) - softmax(teacher / 3.0)) / B
    hard = (softmax(student) - np.eye(K)[labels]) / B
    np.testing.assert_allclose(batch.x.grad.numpy(), 0.6 * softened + 0.4 * hard, rtol=1e-4, atol=1e-7)


def test_kd_learns_from_images_without_labels_too(logits):
    teacher, student, labels = logits
    options = {"unlabelled_weight": {"linear": [0.4, 0.0]}, "temperature": 3.0}
    method = registry.create("method", "kd", options=options)
    assert method.needs_target and not registry.create("method", "kd").needs_target
    rng = np.random.default_rng(1)
    unlabelled = torch.from_numpy(rng.normal(0, 2, (7, K)).astype(np.float32))
    batch = step(teacher, student, labels)
    batch._target, batch._ask_teacher = unlabelled, lambda x: x.flip(1)
    terms = method(batch)
    p, q = softmax(unlabelled.flip(1).numpy() / 3), softmax(unlabelled.numpy() / 3)
    assert terms.keys() == {"ce", "kd", "unlabelled_kd"}
    assert terms["unlabelled_kd"].item() == pytest.approx(0.2 * 9 * (p * np.log(p / q)).sum() / 7, rel=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_scratch_computes_its_formula(logits, label_smoothing):
    _, student, labels = logits
    method = registry.create("method", "scratch", options={"label_smoothing": label_smoothing})
    terms = method(Step(torch.from_numpy(student), torch.from_numpy(labels), progress=0.0, student=lambda x: x))
    target = (1 - label_smoothing) * np.eye(K)[labels] + label_smoothing / K
    assert terms.keys() == {"ce"}
    assert terms["ce"].item() == pytest.approx(float(-(target * np.log(softmax(student))).sum(1).mean()), rel=1e-5)
    assert not method.needs_teacher


def test_a_step_computes_in_float32_once_and_without_gradient_for_the_teacher():
    calls = []

    def network(name):
        layer = nn.Linear(3, K, dtype=torch.bfloat16)

        def forward(*x):
            calls.append(name)
            return layer(torch.ones(B, 3, dtype=torch.bfloat16))

        return forward

    batch = Step(
        torch.ones(B, 3), torch.zeros(B).long(), progress=0.0, student=network("student"), teacher=network("teacher")
    )
    assert calls == []
    for _ in range(2):
        assert batch.student_logits.dtype == batch.teacher_logits.dtype == torch.float32
        assert batch.student_logits.requires_grad
        assert not batch.teacher_logits.requires_grad
    assert sorted(calls) == ["student", "teacher"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": 0.0},
            "error: distill.temperature = 0.0 is not valid\n"
            "       expected: above 0\n"
            "fix:   --set distill.temperature=4",
        ),
        (
            {"kd_weight": 1.5},
            "error: distill.kd_weight = 1.5 leaves a negative weight\n"
            "       expected: both weights at least 0\n"
            "fix:   --set distill.kd_weight=0.7, or give distill.ce_weight",
        ),
        ({"kl_reduction": "sum"}, "error: distill.kl_reduction = "),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(RecipeError) as caught:
        registry.create("method", "kd", options=options, where="distill")
    assert str(caught.value).startswith(message)
    assert caught.value.key == f"distill.{next(iter(options))}"
