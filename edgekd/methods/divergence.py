"""The Kullback-Leibler divergence between softened outputs, which most methods have a part of."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def divergence(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / tau) || softmax(student / tau)) of [B, K] logits: a scalar, the mean over the batch."""
    target = F.log_softmax(teacher_logits / temperature, dim=1)
    output = F.log_softmax(student_logits / temperature, dim=1)
    return F.kl_div(output, target, reduction="batchmean", log_target=True)


def divergences(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """The same for every sample: [B]."""
    target = F.log_softmax(teacher_logits / temperature, dim=1)
    output = F.log_softmax(student_logits / temperature, dim=1)
    return F.kl_div(output, target, reduction="none", log_target=True).sum(1)


def by_place(logits: Tensor) -> Tensor:
    """[B, K] as they are; maps [B, K, H, W] with every pixel as a sample of its own, [B * H * W, K]."""
    return logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2)
