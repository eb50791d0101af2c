"""Labels and answers to try every task with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import registry
from edgekd.tasks import Array, Task

N = 40
OPTIONS: dict[str, dict[str, Any]] = {
    "regression": {"unit": "years", "low": 0.0, "high": 100.0},
    "embedding": {"dimension": 4},
}


@dataclass(frozen=True)
class Read:
    """A part of a source."""

    images: Array
    labels: Array
    file: Path = Path("data.npz")

    def where(self, i: int) -> str:
        return f"data.npz: images[{i}]"


def _masks() -> Array:
    """One square of class 1 to 3 per sample, somewhere; a column that does not count."""
    labels = np.zeros((N, 6, 6), np.int64)
    for i in range(N):
        labels[i, i % 4 : i % 4 + 3, i % 3 : i % 3 + 2] = 1 + i % 3
        labels[i, :, 5] = 255
    return labels


def read(name: str) -> Read:
    """A part whose labels are for the task of that name, as a source reads them."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N, 1, 6, 6), np.uint8)
    labels: dict[str, Array] = {
        "classification": np.arange(N) % 4,
        "regression": rng.uniform(10, 90, N),
        "segmentation": _masks(),
        "embedding": np.arange(N) % 4,
    }
    return Read(images, labels[name])


def fitted(name: str) -> tuple[Task, Array, tuple[str, ...]]:
    """The task, fitted to `read`, with its stored labels and names."""
    part, task = read(name), registry.create("task", name, options=OPTIONS.get(name, {}))
    task.check(part, ())
    names = task.names(part.labels)
    task.check_against_train("test", part, part, names)
    task = task.fitted(part.labels)
    return task, task.stored(part.labels), names


def right_answers(task: Task, labels: Array, names: tuple[str, ...]) -> Array:
    """What a network without fault answers."""
    if task.name == "regression":
        return labels.copy()
    if task.name == "segmentation":
        return 9 * np.moveaxis(np.eye(len(names), dtype=np.float32)[np.where(labels == 255, 0, labels)], -1, 1)
    corners = np.eye(len(names), dtype=np.float32)[labels]
    if task.name == "embedding":  # no two points are equally far from a third
        return corners + np.random.default_rng(1).normal(0, 0.01, corners.shape).astype(np.float32)
    return corners
