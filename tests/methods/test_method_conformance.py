"""Every registered method keeps the contract of the loop: tested on arrival."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from method_pairs import (
    OPTIONS,
    SOURCES,
    B,
    K,
    attached,
    digits_for,
    step_of,
    student_of,
    task_of,
    teacher_of,
)  # fmt: skip

from edgekd import distill, export, registry
from edgekd.data import Dataset
from edgekd.methods import Method
from edgekd.recipe import Augment, Train

METHODS = registry.names("method")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def digits() -> dict[str, Dataset]:
    """By task."""
    return {name: digits_for(name) for name in SOURCES}


def total(method: Method, student, teacher, progress: float = 0.25) -> torch.Tensor:
    torch.manual_seed(4)
    return torch.stack(list(method(step_of(method, student, teacher, progress)).values())).sum()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_test_of_its_formula(name):
    """Called by its name: test_NAME, or test_NAME_ and what it shows."""
    files = [*HERE.glob("test_*.py"), HERE.parent / "test_methods.py"]
    assert any(re.search(rf"^def test_{name}[_(]", file.read_text(encoding="utf-8"), re.MULTILINE) for file in files)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_teaches_the_student_and_leaves_the_teacher(name):
    student, teacher = student_of(name), teacher_of(name)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    method = attached(name, student, teacher).train()
    terms = method(step_of(method, student, teacher))
    assert terms
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    sum(terms.values()).backward()
    learned = [parameter.grad for parameter in [*student.parameters(), *method.parameters()]]
    if method.uses_all_parameters:
        assert all(grad is not None for grad in learned)
    assert all(grad.isfinite().all() for grad in learned if grad is not None)
    assert any(parameter.grad.abs().sum() > 0 for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training and student.training
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
    owned = {id(parameter) for parameter in method.parameters()}
    assert owned.isdisjoint(id(parameter) for network in (student, teacher) for parameter in network.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_no_method_leaves_a_trace_in_the_networks(name):
    student, teacher = student_of(name), teacher_of(name)
    method = attached(name, student, teacher)
    total(method, student, teacher)
    assert not [module for one in (student, teacher) for module in one.modules() if module._forward_hooks]


@pytest.mark.parametrize("name", METHODS)
def test_the_state_of_every_method_is_in_its_state_dict(name):
    student, teacher = student_of(name), teacher_of(name)
    method = attached(name, student, teacher)
    total(method, student, teacher)
    saved = {key: value.clone() for key, value in method.state_dict().items()}
    weights = {key: value.clone() for key, value in student.state_dict().items()}
    expected = total(method, student, teacher)
    again = attached(name, student, teacher)
    again.load_state_dict(saved)
    student.load_state_dict(weights)
    assert total(again, student, teacher).item() == expected.item()


SCHEDULED = [
    pytest.param(entry.name, option.name, id=f"{entry.name}-{option.name}")
    for entry in registry.entries("method")
    for option in entry.options.values()
    if "schedule" in registry.typename(option.annotation)
]


# With what else an option has an effect in the middle of a training.
BESIDE: dict[tuple[str, str], dict[str, object]] = {
    ("cross_layer", "gram_weight"): {"first": 0.75},
    ("kd", "confidence"): {"selective": "sure"},
    ("mutual_sources", "sharpness"): {"rounds": 2},
}


@pytest.mark.parametrize(("name", "option"), SCHEDULED)
def test_every_schedule_is_followed_and_logged(name, option):
    def made_of(value: object) -> dict[str, float]:
        """The terms of a step, and what it leaves behind."""
        student, teacher = student_of(name), teacher_of(name)
        given = {**OPTIONS.get(name, {}), **BESIDE.get((name, option), {}), option: value}
        method = attached(name, student, teacher, **given)
        if isinstance(value, dict):
            assert method.scheduled(0.5)[option] == pytest.approx(0.5)
        optimizers = method.optimizers()
        torch.manual_seed(4)
        found = {term: loss.item() for term, loss in method(step_of(method, student, teacher, 0.5)).items()}
        method.constrain(student, step_size=0.1, progress=0.5)
        for owner, state in (("student", student.state_dict()), ("method", method.state_dict())):
            found[owner] = sum(values.double().abs().sum().item() for values in state.values())
        return found | {f"lr {number}": one.param_groups[0]["lr"] for number, one in enumerate(optimizers)}

    followed = made_of({"linear": [0.75, 0.25]})
    assert followed == made_of(0.5)
    if name != "bss":  # which attacks what both networks tell right: these have not learned anything
        assert followed != made_of(0.8)


class Kill(Exception):  # noqa: N818
    pass


def train(name: str, digits: dict[str, Dataset], work: Path, die_at: int = 0) -> torch.nn.Module:
    """Two epochs of five batches; with `die_at` once killed after that batch, and resumed."""
    method = bare(name)
    dataset = digits[task_of(method).name]
    (outputs,) = dataset.outputs
    student, teacher = student_of(name, outputs).eval(), teacher_of(name, outputs)

    def on_progress(progress: distill.Progress) -> None:
        if progress.done == die_at:
            raise Kill

    distill.train(
        student, dataset, Train(epochs=2, batch_size=12, lr=0.02, keep="last"), method,
        teacher=teacher if method.needs_teacher else None, augment=Augment(crop=1), seed=0, work=work,
        on_progress=on_progress,
    )  # fmt: skip
    return student


def bare(name: str) -> Method:
    method: Method = registry.create("method", name, options=OPTIONS.get(name, {}))
    return method


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_training_ends_with_the_same_bits(name, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(distill, "LOOK_EVERY", 1)
    whole = train(name, digits, tmp_path / "whole")
    for die_at in (3, 7):
        with pytest.raises(Kill):
            train(name, digits, tmp_path / "killed", die_at)
    resumed = train(name, digits, tmp_path / "killed")
    for (key, value), expected in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_in_onnx(name, digits, tmp_path):
    student = train(name, digits, tmp_path / "work")
    dataset = digits[task_of(bare(name)).name]
    x = dataset.normalize(dataset.test.images[:B])
    export.export(
        student, tmp_path / "student.onnx", example=x[:1], opset=20, form="relu_sum", dynamic_batch=True, metadata={}
    )
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x})
    expected = student(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert logits.shape == (B, *dataset.outputs) != (B, K)
    assert sum(parameter.numel() for parameter in student.parameters()) < 20_000
