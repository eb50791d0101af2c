from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd import registry
from edgekd.methods import Step
from edgekd.tasks.embedding import Embedding


def test_embedding_weighs_directions_relations_and_labels():
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(0, 1, (7, 5)) for _ in range(2))
    labels = np.array([0, 1, 0, 1, 2, 2, 0])
    options = {"direction_weight": 0.5, "relation_weight": 2.0, "label_weight": 0.25}
    method, task = registry.create("method", "embedding", options=options), Embedding(dimension=5)
    step = Step(
        torch.from_numpy(student), torch.from_numpy(labels), progress=0.5, student=lambda x: x,
        teacher=lambda: torch.from_numpy(teacher), task=task,
    )  # fmt: skip
    terms = {name: value.item() for name, value in method(step).items()}
    s, t = (points / np.linalg.norm(points, axis=1, keepdims=True) for points in (student, teacher))
    assert terms["direction"] == pytest.approx(0.5 * np.mean(1 - (s * t).sum(1)), rel=1e-5)
    assert terms["relation"] == pytest.approx(2.0 * np.mean((s @ s.T - t @ t.T) ** 2), rel=1e-5)
    assert terms["task"] == pytest.approx(0.25 * float(task.loss(torch.from_numpy(student), torch.from_numpy(labels))))


def test_a_turned_and_stretched_student_has_the_teachers_relations_but_not_its_directions():
    rng = np.random.default_rng(0)
    teacher = rng.normal(0, 1, (7, 5))
    turn, _ = np.linalg.qr(rng.normal(0, 1, (5, 5)))
    step = Step(
        torch.from_numpy(3 * teacher @ turn), torch.zeros(7, dtype=torch.int64), progress=0.0, student=lambda x: x,
        teacher=lambda: torch.from_numpy(teacher), task=Embedding(dimension=5),
    )  # fmt: skip
    terms = registry.create("method", "embedding")(step)
    assert terms["relation"].item() < 1e-10 < terms["direction"].item()
