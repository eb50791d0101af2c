"""A network's classifier: the layer whose rows are the classes' vectors, and the angles between these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# acos has no finite slope at 1; the angles are only looked at, but stay numbers.
LIMIT = 1 - 1e-7


def classifiers(network: nn.Module, num_classes: int) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that could be it, by path: those with a row for each class. It is the last one."""
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and len(module.weight) == num_classes
    }


def angles_between(vectors: Tensor) -> Tensor:
    """The angles in degrees, [K (K - 1) / 2], between any two of K vectors [K, ...]: of 0 and 1, 0 and 2, ..."""
    unit = F.normalize(vectors.detach().flatten(1).float())
    first, second = torch.triu_indices(len(unit), len(unit), 1, device=unit.device)
    return (unit @ unit.T).clamp(-LIMIT, LIMIT).acos().rad2deg()[first, second]


def class_angles(network: nn.Module, num_classes: int) -> dict[str, Any] | None:
    """Between two classes, in degrees: smallest, mean and largest angle, and the classes `closest` to each other.

    None for a network without a linear classifier, or with a single output.
    """
    layers = list(classifiers(network, num_classes).values())
    if not layers or num_classes < 2:
        return None
    angles = angles_between(layers[-1].weight)
    pairs = torch.triu_indices(num_classes, num_classes, 1).T
    return {
        "smallest_deg": float(angles.min()),
        "mean_deg": float(angles.mean()),
        "largest_deg": float(angles.max()),
        "closest": pairs[int(angles.argmin())].tolist(),
    }
