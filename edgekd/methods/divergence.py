"""The Kullback-Leibler divergence between softened outputs, which most methods have a part of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from edgekd.schedule import Schedule, value_at

if TYPE_CHECKING:
    from edgekd.methods import Step


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


def softening(temperature: float | Schedule | None, step: Step) -> float:
    """tau at this moment of the training; None is the task's."""
    return step.task.kd_temperature if temperature is None else value_at(temperature, step.progress)


def from_teacher(
    step: Step, teacher_logits: Tensor, student_logits: Tensor, weights: tuple[float, float], tau: float, name: str = ""
) -> dict[str, Tensor]:
    """What distillation adds to the loss by a name: {kd: of every answer; joint: of all together, where there is that}.

    weights: of both.
    """
    each, joint = weights
    terms = {f"{name}kd": each * divergence(by_place(teacher_logits), by_place(student_logits), tau)}
    together = step.task.joint_divergence(student_logits, teacher_logits)
    return terms if together is None else terms | {f"{name}joint": joint * together}
