"""Labels and answers to try every task with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import registry
from edgekd.tasks import Array, Task

N = 40
OPTIONS: dict[str, dict[str, Any]] = {"regression": {"unit": "years", "low": 0.0, "high": 100.0}}


@dataclass(frozen=True)
class Read:
    """A part of a source."""

    images: Array
    labels: Array
    file: Path = Path("data.npz")

    def where(self, i: int) -> str:
        return f"data.npz: images[{i}]"


def read(name: str) -> Read:
    """A part whose labels are for the task of that name, as a source reads them."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N, 1, 6, 6), np.uint8)
    labels: dict[str, Array] = {
        "classification": np.arange(N) % 4,
        "regression": rng.uniform(10, 90, N),
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
    return np.eye(len(names), dtype=np.float32)[labels]
