"""Small networks of edgekd's own, and steps for methods that are attached to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from edgekd import data, networks, registry
from edgekd.data import Dataset, Shape
from edgekd.methods import CLASSIFICATION, Method, Setting, Step
from edgekd.networks import Ensemble
from edgekd.tasks import Task
from edgekd.tasks.classification import Classification
from edgekd.tasks.embedding import Embedding
from edgekd.tasks.regression import Regression

B, K, N = 12, 5, 40
SHAPE = Shape(1, 8, 8)
# What a method needs beyond its defaults, to be tried in a moment.
OPTIONS: dict[str, dict[str, Any]] = {
    "combined": {"methods": ["kd", {"rkd": {"distance_weight": 2.0}}, "fitnet"]},
    "staged": {"methods": ["kd", "fitnet"], "epochs": [1, 1]},
    "dfad": {"student_steps": 2, "latent": 8},
    "crd": {"negatives": 16, "dimensions": 8},
}
# Methods that learn from the members of an ensemble.
OF_SEVERAL = ("cross_layer", "mutual_sources")
# Where digits have what a task asks for: options of the source, and the task.
SOURCES: dict[str, tuple[dict[str, Any], Any]] = {
    "classification": ({}, None),
    "regression": ({"target": "slant"}, None),
    "embedding": ({}, {"embedding": {"dimension": 6}}),
}
# What a method teaches, where that is not any network.
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "spread": ("spread", {"part": {"network": "resnet", "depth": 8, "width": 0.25}, "boards": 3, "filters": 24}),
}


def network(width: float, seed: int, depth: int = 8) -> nn.Module:
    return networks.build("resnet", {"depth": depth, "width": width}, SHAPE, K, ("relu", {}), seed)


def student_of(method: str, classes: int = K) -> nn.Module:
    """A student that the method can teach."""
    name, options = STUDENTS.get(method, ("resnet", {"depth": 8, "width": 0.25}))
    return networks.build(name, options, SHAPE, classes, ("relu", {}), 0)


def teacher_of(method: str, outputs: int = K) -> nn.Module:
    """A teacher with opinions, though nobody has taught it; an ensemble where the method learns from the members."""
    teachers = [
        networks.build("resnet", {"depth": 8, "width": 0.375}, SHAPE, outputs, ("relu", {}), seed) for seed in (1, 2)
    ]
    torch.manual_seed(5)
    for one in teachers:
        nn.init.normal_(one.fc.weight, 0, 0.3)
        nn.init.zeros_(one.fc.bias)
    made = Ensemble(teachers, "logits") if method in OF_SEVERAL else teachers[0]
    return made.eval().requires_grad_(False)


def digits_for(task: str) -> Dataset:
    """Few digits, with labels for the task; for classes with images of a target domain too."""
    options, choice = SOURCES[task]
    dataset = data.load("digits", options, task=choice, train_limit=60, test_limit=20)
    return data.with_target(dataset, "digits", {}) if task == "classification" else dataset


def pair(method: str = "") -> tuple[nn.Module, nn.Module]:
    """Student and teacher with other channels than the student's."""
    return student_of(method), network(0.375, 1).eval().requires_grad_(False)


def task_of(method: Method) -> Task:
    """One that the method learns: classification, wherever it does."""
    if method.tasks is None or "classification" in method.tasks:
        return Classification()
    return Embedding(dimension=K) if "embedding" in method.tasks else Regression(center=0.0, scale=1.0)


def labels_of(task: Task) -> torch.Tensor:
    """Of all N samples, for K outputs."""
    if isinstance(task, Classification | Embedding):
        return torch.arange(N) % K
    return torch.randn(N, K, generator=torch.Generator().manual_seed(5))


def setting(epochs: int = 2, task: Task = CLASSIFICATION) -> Setting:
    generator = torch.Generator().manual_seed(3)
    return Setting(
        torch.randn(2, 1, 8, 8, generator=generator), labels_of(task), K,
        torch.full((1, 1, 1), 0.3), torch.full((1, 1, 1), 0.4), epochs,
        lambda n: torch.randn(min(n, N), 1, 8, 8, generator=torch.Generator().manual_seed(6)), task,
    )  # fmt: skip


def attached(name: str, student: nn.Module, teacher: nn.Module | None, **options: Any) -> Method:
    torch.manual_seed(1)
    method: Method = registry.create("method", name, options=options or OPTIONS.get(name, {}))
    method.attach(student, teacher if method.needs_teacher else None, setting(task=task_of(method)))
    return method


def step_of(method: Method, student: nn.Module, teacher: nn.Module, progress: float = 0.25) -> Step:
    """A batch, the same at every call."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, 1, 8, 8, generator=generator)
    index = torch.randperm(N, generator=generator)[:B]
    given = {"teacher": lambda: teacher(x), "ask_teacher": teacher} if method.needs_teacher else {}
    given |= {"target": torch.randn(B, 1, 8, 8, generator=generator) + 1} if method.needs_target else {}
    task = task_of(method)
    return Step(
        x, labels_of(task)[index], progress=progress, student=student, index=index, student_taps=method.student_taps,
        teacher_taps=method.teacher_taps, task=task, **given,
    )  # fmt: skip


def one_step(name: str, progress: float = 0.25, **options: Any) -> tuple[dict[str, float], Step, Method]:
    """A fresh method's terms as numbers, its step, and the method."""
    student, teacher = pair(name)
    method = attached(name, student, teacher, **options)
    step = step_of(method, student, teacher, progress)
    torch.manual_seed(4)
    return {term: value.item() for term, value in method(step).items()}, step, method


def arrays(features: dict[str, torch.Tensor]) -> list[np.ndarray]:
    return [value.detach().double().numpy() for value in features.values()]


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(softmax(logits)[np.arange(len(labels)), labels]).mean())
