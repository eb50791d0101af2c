"""The learning rate as a pure function of where the training stands: nothing to remember, nothing to resume."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgekd.recipe import Train

# Plateau: a gain of validation accuracy below 0.1 points is none (Xu et al., AAAI 2020, supplement); see Metric.gain.
GAIN = 0.001


def learning_rate(spec: Train, update: int, updates: int, gains: Sequence[float]) -> float:
    """The learning rate of an update of the weights, counted from 0, of `updates` in all.

    gains: how good the network was on the validation split after each epoch so far, 0.001 being the least gain; read by
    `plateau` alone.
    Over the first `warmup` epochs it rises linearly to `lr`; the cosine (Loshchilov and Hutter, ICLR 2017, without
    restarts) spans what comes after them, the milestones of `step` the whole training.
    """
    warmup = updates * min(1.0, spec.warmup / spec.epochs)
    if update < warmup:
        return spec.lr * (update + 1) / math.ceil(warmup)
    if spec.schedule == "cosine":
        return spec.lr * 0.5 * (1 + math.cos(math.pi * (update - warmup) / (updates - warmup)))
    if spec.schedule == "step":
        return spec.lr * spec.gamma ** sum(update >= milestone * updates for milestone in spec.milestones)
    if spec.schedule == "plateau":
        return spec.lr * spec.gamma ** falls(gains, spec.patience)
    return spec.lr


def falls(gains: Sequence[float], patience: int) -> int:
    """How often the score has not risen for more than `patience` epochs in a row; as torch's ReduceLROnPlateau."""
    count, best, stale = 0, -math.inf, 0
    for gain in gains:
        if gain > best + GAIN:
            best, stale = gain, 0
        else:
            stale += 1
        if stale > patience:
            count, stale = count + 1, 0
    return count
