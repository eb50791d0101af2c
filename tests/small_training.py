"""Trainings of a moment on digits, with options by name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from edgekd import distill, registry
from edgekd.data import Dataset
from edgekd.methods import Method
from edgekd.recipe import Augment, Train


def plain(seed: int = 0) -> nn.Module:
    """Without batch normalisation, dropout or anything else that depends on the batch."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 10))


def trained(network: nn.Module, dataset: Dataset, work: Path, method: Method | None = None, **given) -> distill.Trained:
    rest = {key: given.pop(key) for key in ("teacher", "logits_cache", "on_progress", "seed") if key in given}
    augment = given.pop("augment", {})
    spec = Train(**{"epochs": 2, "batch_size": 32, "lr": 0.05, **given})
    method = method or registry.create("method", "kd" if "teacher" in rest else "scratch")
    return distill.train(network, dataset, spec, method, augment=Augment(**augment), work=work, **{"seed": 0, **rest})
