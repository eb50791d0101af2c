"""Adversarially robust distillation.

Goldblum, Fowl, Feizi, Goldstein, "Adversarially Robust Distillation" (ARD), AAAI 2020, eq. 3, and its code: the student
shall answer for an attacked image what the teacher answers for the clean one,

    L = kd_weight tau^2 KL( T_tau(x) || S_tau(x + delta) ) + ce_weight CE( S(x), y ),
    delta = PGD on CE( S(x + delta), y )

with epsilon 8/255, 10 steps of 2/255 from a random start, tau 30, kd_weight 1. As in the code KL is averaged over the
classes too; an option. The attack is made in evaluation mode. A robust student needs a robust teacher.

The paper's fast variant takes the attack from the backward passes of repeated batches, which is known from its abstract
only, and is not here. `steps: 1, step_size: 10` costs about as much (Wong, Rice, Kolter, ICLR 2020).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.methods import Method, Setting, Step
from edgekd.methods.attacks import Ball, evaluating, pgd
from edgekd.methods.divergence import divergence
from edgekd.methods.options import above_zero, at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at


@register("method", "ard")
class ARD(Method):
    """Under attack the student answers what the teacher answers without: robustness is distilled.

    kd_weight: weight of the KL term. ce_weight: of the cross-entropy on clean images. temperature: tau.
    epsilon, step_size: of the attack, in units of 1/255 of the pixel scale. steps: of its gradient.
    kl_reduction: `batchmean` sums KL over the classes, `mean` averages over them as well.
    """

    def __init__(
        self,
        *,
        kd_weight: float | Schedule = 1.0,
        ce_weight: float | Schedule = 0.0,
        temperature: float | Schedule = 30.0,
        epsilon: float | Schedule = 8.0,
        step_size: float | Schedule = 2.0,
        steps: int = 10,
        kl_reduction: Literal["batchmean", "mean"] = "mean",
    ) -> None:
        super().__init__()
        self.kd_weight, self.ce_weight, self.temperature = kd_weight, ce_weight, temperature
        self.epsilon, self.step_size, self.steps, self.kl_reduction = epsilon, step_size, steps, kl_reduction
        above_zero("temperature", temperature, 30)
        above_zero("step_size", step_size, 2)
        for name, option in (
            ("kd_weight", kd_weight),
            ("ce_weight", ce_weight),
            ("epsilon", epsilon),
            ("steps", steps),
        ):
            at_least_zero(name, option, 1)
        self.mean: Tensor
        self.std: Tensor

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Remember what images are: what black and white are after normalisation."""
        self.register_buffer("mean", setting.mean, persistent=False)
        self.register_buffer("std", setting.std, persistent=False)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, kd: scalar}."""
        epsilon, step_size, tau = (
            value_at(option, step.progress) for option in (self.epsilon, self.step_size, self.temperature)
        )
        ball = Ball.of(epsilon, step_size, self.mean, self.std)
        with evaluating(step.student):
            attacked = pgd(lambda x: F.cross_entropy(step.student(x).float(), step.y), step.x, ball, self.steps)
        logits = step.student(attacked).float()
        step.record("accuracy_attacked", (logits.argmax(1) == step.y).float().mean())
        kl = divergence(step.teacher_logits, logits, tau) * tau**2
        scale = value_at(self.kd_weight, step.progress) / (logits.shape[1] if self.kl_reduction == "mean" else 1)
        return {
            "ce": value_at(self.ce_weight, step.progress) * F.cross_entropy(step.student_logits, step.y),
            "kd": scale * kl,
        }
