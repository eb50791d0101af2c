"""Decoupled knowledge distillation.

Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, eq. 6 and 7. With p the softened output and
t the label, the divergence of Hinton et al. is split into that of (p_t, 1 - p_t), "target class", and that of the other
classes among themselves, "non-target classes", and each part gets a weight of its own:

    KD   = KL(b_T || b_S) + (1 - p_T,t) KL(q_T || q_S),   b = (p_t, 1 - p_t),  q_i = p_i / (1 - p_t) for i != t
    L    = ce_weight CE + kd_weight tau^2 (alpha KL(b_T || b_S) + beta KL(q_T || q_S))

As in the authors' code kd_weight rises linearly over the first 20 of 240 epochs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekd.methods import Method, Step
from edgekd.methods.options import above_zero, at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at


@register("method", "dkd")
class DKD(Method):
    """Target and non-target classes are matched by two terms with weights of their own.

    alpha: weight of the target class against the rest. beta: weight of the other classes among themselves.
    kd_weight: of both together. ce_weight: weight of the cross-entropy. temperature: tau, softens both outputs.
    """

    def __init__(
        self,
        *,
        alpha: float | Schedule = 1.0,
        beta: float | Schedule = 8.0,
        kd_weight: float | Schedule = {"linear": [0.0, 1.0, 0.083]},  # noqa: B006 - read, never changed
        ce_weight: float | Schedule = 1.0,
        temperature: float | Schedule = 4.0,
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.kd_weight, self.ce_weight = kd_weight, ce_weight
        above_zero("temperature", temperature, 4)
        for name, option in (("alpha", alpha), ("beta", beta), ("kd_weight", kd_weight), ("ce_weight", ce_weight)):
            at_least_zero(name, option, 1)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, target: scalar, non_target: scalar}."""
        tau = value_at(self.temperature, step.progress)
        weight = value_at(self.kd_weight, step.progress) * tau**2
        of_label = F.one_hot(step.y, step.student_logits.shape[1]).bool()
        teacher, student = (_parts(logits / tau, of_label) for logits in (step.teacher_logits, step.student_logits))
        target, non_target = (
            F.kl_div(output, wanted, reduction="batchmean", log_target=True)
            for output, wanted in zip(student, teacher, strict=True)
        )
        return {
            "ce": value_at(self.ce_weight, step.progress) * F.cross_entropy(step.student_logits, step.y),
            "target": weight * value_at(self.alpha, step.progress) * target,
            "non_target": weight * value_at(self.beta, step.progress) * non_target,
        }


def _parts(logits: Tensor, of_label: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, 2] of the label and of all the rest, and [B, K-1] of the rest among themselves."""
    logarithms = F.log_softmax(logits, dim=1)
    label = logarithms[of_label]
    others = logarithms[~of_label].view(len(logits), -1)
    rest = others.logsumexp(1)
    return torch.stack((label, rest), 1), others - rest[:, None]
