from __future__ import annotations

import numpy as np
import pytest
import torch
from method_pairs import pair

from edgekd import data, registry
from edgekd.errors import RecipeError
from edgekd.methods import Step, attachment
from edgekd.recipe import Train
from edgekd.tasks.regression import Regression


@pytest.mark.parametrize(("teacher_weight", "label_weight"), [(1.0, 0.0), (0.3, 2.0)])
def test_regression_cuts_the_students_values_and_compares_them_with_teacher_and_labels(teacher_weight, label_weight):
    rng = np.random.default_rng(0)
    student, teacher, labels = (rng.normal(0, 2, (9, 1)).astype(np.float32) for _ in range(3))
    task = Regression(low=-10, high=30, center=10, scale=20)
    options = {"teacher_weight": teacher_weight, "label_weight": label_weight}
    method = registry.create("method", "regression", options=options)
    step = Step(
        torch.from_numpy(student), torch.from_numpy(labels), progress=0.5, student=lambda x: x,
        teacher=lambda: torch.from_numpy(teacher), task=task,
    )  # fmt: skip
    terms = method(step)
    cut = np.clip(student.astype(np.float64), -1, 1)
    assert terms["teacher"].item() == pytest.approx(teacher_weight * ((cut - teacher) ** 2).mean(), rel=1e-5)
    assert terms["task"].item() == pytest.approx(label_weight * ((cut - labels) ** 2).mean(), rel=1e-5)


def test_weights_that_leave_nothing_to_learn_are_refused():
    with pytest.raises(RecipeError, match="nothing is left to learn"):
        registry.create("method", "regression", options={"teacher_weight": 0.0})


@pytest.mark.parametrize(
    ("target", "name", "options", "fix"),
    [
        ("slant", "dkd", {}, "regression"),
        ("class", "regression", {}, "kd"),
        ("slant", "combined", {"methods": ["rkd", "dkd"]}, "regression"),
    ],
)
def test_a_method_refuses_a_task_that_it_does_not_learn(target, name, options, fix):
    dataset = data.load("digits", {"target": target}, train_limit=60, test_limit=20)
    method = registry.create("method", name, options=options)
    with pytest.raises(RecipeError) as caught:
        attachment.attach(method, *pair(), dataset, Train())
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(f"and digits is for {dataset.task.name}")
    assert lines[1].strip().startswith(f"methods for {dataset.task.name}: ") and "scratch" in lines[1]
    assert lines[2] == f"fix:   --set distill.method={fix}"


def test_several_methods_learn_what_all_of_them_learn():
    both = registry.create("method", "combined", options={"methods": ["scratch", "regression"]})
    assert both.tasks == ("regression",)
    assert registry.create("method", "combined", options={"methods": ["scratch"]}).tasks is None
