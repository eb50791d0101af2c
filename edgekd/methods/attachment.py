"""A method meets its networks and its data; what does not fit is found here, before training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from edgekd import registry
from edgekd.data import Dataset
from edgekd.errors import RecipeError, StageError
from edgekd.methods import Method, Setting
from edgekd.recipe import Train


def attach(method: Method, student: nn.Module, teacher: nn.Module | None, dataset: Dataset, spec: Train) -> None:
    """Attach a method to its networks, which are on one device, trained or not.

    Raises RecipeError when it cannot learn from them: no teacher, taps that do not exist, options that do not fit.
    """
    if method.needs_teacher and teacher is None:
        raise _without_teacher(method, dataset)
    if method.needs_target and dataset.target is None:
        raise RecipeError(
            f"the method {name_of(method)} learns from images of a target domain, and the recipe names none",
            allowed="data.target_domain: SOURCE or {SOURCE: {option: value}}, like data.source; labels are not used",
            fix="--set 'data.target_domain={folder: {path: FOLDER}}', or another distill.method",
            key="data.target_domain",
        )
    if method.needs_images and "train" in dataset.stand_ins:
        makers = [entry.name for entry in registry.entries("method") if not getattr(entry.load(), "needs_images", True)]
        raise RecipeError(
            f"the method {name_of(method)} learns from images, and data.source = {dataset.name} has none",
            allowed=f"methods that make their own: {', '.join(makers)}",
            fix=f"--set distill.method={makers[0]}, or name a data set",
            key="distill.method",
        )
    if "val" in dataset.stand_ins and spec.schedule == "plateau":
        raise RecipeError(
            "train.schedule = plateau follows the validation split, and there are no images to validate on",
            allowed="expected: constant, step or cosine",
            fix="--set distill.train.schedule=cosine",
            key="distill.train.schedule",
        )
    device = next(student.parameters()).device
    _check_task(method, dataset, teacher)
    ones = [1] * (len(dataset.shape.dimensions) - 1)
    mean, std = (torch.tensor(values, device=device).view(-1, *ones) for values in (dataset.mean, dataset.std))
    labels = torch.from_numpy(dataset.train.labels).to(device)

    def images(n: int) -> Tensor:
        # From all over the split: folders are read class by class.
        chosen = np.linspace(0, len(dataset.train) - 1, min(n, len(dataset.train))).round().astype(np.int64)
        return torch.from_numpy(dataset.normalize(dataset.train.images[chosen])).to(device)

    setting = Setting(images(2), labels, dataset.num_classes, mean, std, spec.epochs, images, dataset.task)
    method.attach(student, teacher, setting)
    if (taps := method.student_taps.paths) and spec.compile:
        raise RecipeError(
            "train.compile = true cannot be combined with a method that taps features of the student",
            allowed=f"the compiled network does not call the modules that are tapped: {', '.join(taps)}",
            fix="set distill.train.compile = false",
            key="distill.train.compile",
        )


def name_of(method: Method) -> str:
    """What a recipe calls it; of one that is not registered, its class."""
    kind = type(method)
    found = (e.name for e in registry.entries("method") if (e.module, e.attribute) == (kind.__module__, kind.__name__))
    return next(found, kind.__name__)


def _without_teacher(method: Method, dataset: Dataset) -> RecipeError:
    """Of several methods, those that learn from a teacher are named."""
    every = [one for one in method.modules() if isinstance(one, Method) and one.needs_teacher]
    single = [one for one in every if not any(other in every for other in one.modules() if other is not one)]
    names = list(dict.fromkeys(name_of(one) for one in single))
    # Without images, what a teacher knows is all that there is to learn from.
    others = [] if "train" in dataset.stand_ins else _methods_for(dataset.task.name, alone=True)
    instead = ", or --set distill.method=scratch" if "scratch" in others else ""
    return RecipeError(
        f"distill needs a teacher for {', '.join(names)}, and there is none",
        allowed=f"methods for {dataset.task.name} without a teacher: {', '.join(others) or 'none without images'}",
        fix=f"name a teacher: --set teacher.network=NAME{instead}",
        key="distill.method",
    )


def _check_task(method: Method, dataset: Dataset, teacher: nn.Module | None) -> None:
    """Raise RecipeError when a method does not know what to make of the task's answers and labels."""
    if method.tasks is not None and dataset.task.name not in method.tasks:
        task = dataset.task.name
        others = _methods_for(task, alone=teacher is None)
        raise RecipeError(
            f"the method {name_of(method)} learns {' or '.join(method.tasks)}, and {dataset.name} is for {task}",
            allowed=f"methods for {task}: {', '.join(others)}",
            fix=f"--set distill.method={next((one for one in (task, 'kd') if one in others), others[0])}",
            key="distill.method",
        )


def _methods_for(task: str, *, alone: bool) -> list[str]:
    """The names of those that learn this task; alone: without a teacher."""
    methods = {entry.name: entry.load() for entry in registry.entries("method")}
    known = [name for name, one in methods.items() if (tasks := getattr(one, "tasks", None)) is None or task in tasks]
    return [name for name in known if not (alone and getattr(methods[name], "needs_teacher", True))]


def check_batch_norm(network: nn.Module, batch_size: int) -> None:
    """Raise StageError when batch normalisation would see a single sample."""
    if batch_size == 1 and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise StageError(
            "the network has batch normalisation, which learns nothing from a batch of one sample",
            allowed="expected: at least 2 samples a step and process",
            fix="raise train.batch_size, or give more training samples",
        )


def check_replays(method: Method, batches: int) -> None:
    """Raise StageError when an epoch ends before its first batch has been replayed as often as the method asks."""
    if method.replays > batches:
        raise StageError(
            f"the method takes every batch {method.replays} times in a row, and the steps of an epoch are {batches}",
            allowed="expected: as many steps in an epoch at least",
            fix="lower train.batch_size or how often the method replays, or give more training samples",
        )
