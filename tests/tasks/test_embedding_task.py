from __future__ import annotations

import numpy as np
import pytest
import torch
from task_answers import Read

from edgekd.errors import DataError, RecipeError
from edgekd.tasks import embedding
from edgekd.tasks.embedding import Embedding


def test_every_sample_asks_for_its_nearest_neighbour_by_angle(monkeypatch):
    rng = np.random.default_rng(0)
    points, labels = rng.normal(0, 1, (50, 6)).astype(np.float32), rng.integers(0, 5, 50)
    expected = []
    for i in range(50):
        cosines = [
            -2.0 if j == i else float(points[i] @ points[j] / np.linalg.norm(points[i]) / np.linalg.norm(points[j]))
            for j in range(50)
        ]
        expected.append(labels[int(np.argmax(cosines))] == labels[i])
    task = Embedding(dimension=6)
    assert task.quality(points, labels).tolist() == expected
    assert task.quality(10 * points, labels).tolist() == expected  # length says nothing
    monkeypatch.setattr(embedding, "ROWS", 7)
    assert task.quality(points, labels).tolist() == expected


def test_the_loss_is_that_of_its_equation():
    rng = np.random.default_rng(1)
    points, labels = rng.normal(0, 1, (9, 4)), np.array([0, 0, 1, 1, 1, 2, 2, 3, 0])
    z = points / np.linalg.norm(points, axis=1, keepdims=True)
    near = z @ z.T / 0.5
    each = []
    for i in range(9):
        others = [a for a in range(9) if a != i]
        same = [p for p in others if labels[p] == labels[i]]
        if same:  # the sample of class 3 is alone
            each.append(-np.mean([near[i, p] - np.log(np.exp(near[i, others]).sum()) for p in same]))
    assert len(each) == 8
    found = Embedding(temperature=0.5).loss(torch.from_numpy(points), torch.from_numpy(labels))
    assert float(found) == pytest.approx(np.mean(each), rel=1e-6)


def test_a_batch_without_two_of_a_class_teaches_nothing():
    points = torch.randn(4, 8, requires_grad=True)
    loss = Embedding().loss(points, torch.arange(4))
    loss.backward()
    assert loss.item() == 0 and not points.grad.any()


def test_a_test_part_may_have_classes_of_its_own():
    images = np.zeros((4, 1, 2, 2), np.uint8)
    task, train = Embedding(), Read(images, np.array([0, 1, 0, 1]))
    task.check_against_train("test", Read(images, np.array([2, 3, 2, 3])), train, ("0", "1", "2", "3"))
    with pytest.raises(DataError, match="of one class"):
        task.check_against_train("train", Read(images, np.zeros(4, int)), Read(images, np.zeros(4, int)), ("0",))


@pytest.mark.parametrize("options", [{"dimension": 1}, {"temperature": 0.0}])
def test_what_makes_no_embedding_is_refused(options):
    with pytest.raises(RecipeError, match="make no embedding"):
        Embedding(**options)
