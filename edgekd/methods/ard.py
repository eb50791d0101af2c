"""Adversarially robust distillation.

Goldblum, Fowl, Feizi, Goldstein, "Adversarially Robust Distillation" (ARD), AAAI 2020, eq. 3, and its code: the student
shall answer for an attacked image what the teacher answers for the clean one,

    L = kd_weight tau^2 KL( T_tau(x) || S_tau(x + delta) ) + ce_weight CE( S(x), y ),
    delta = PGD on CE( S(x + delta), y )

with epsilon 8/255, 10 steps of 2/255 from a random start, tau 30, kd_weight 1. As in the code KL is averaged over the
classes too; that and tau^2 are options, as in `kd`. The attack is made in evaluation mode. A robust student needs a
robust teacher.

With `replays` it is the paper's fast variant, Fast-ARD, which is ARD by "free" adversarial training (Shafahi et al.,
NeurIPS 2019); known from the paper's abstract, so that its details are a reconstruction [R]. So many steps in a row
take the same batch, and the backward pass that moves the weights also moves the attack,

    delta <- clip( delta + epsilon sign( gradient of the kd term by x + delta ), epsilon ),

from a random start of every batch. (Shafahi et al. go on with the delta of the batch before; then a training that is
resumed would not be the same.) An epoch has as many steps as ever, each with one backward pass instead of `steps` + 1,
and sees a share of the samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import RecipeError
from edgekd.methods import Method, Setting, Step
from edgekd.methods.attacks import Ball, evaluating, pgd, random_start
from edgekd.methods.divergence import divergence
from edgekd.methods.options import above_zero, at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at


@register("method", "ard")
class ARD(Method):
    """Under attack the student answers what the teacher answers without: robustness is distilled.

    kd_weight: weight of the KL term. ce_weight: of the cross-entropy on clean images. temperature: tau.
    epsilon, step_size: of the attack, in units of 1/255 of the pixel scale. steps: of its gradient.
    tau_squared: multiply KL by tau^2.
    kl_reduction: `batchmean` sums KL over the classes, `mean` averages over them as well.
    replays: of every batch, from 2, in the fast variant, whose steps are epsilon; null is an attack for every batch.
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
        tau_squared: bool = True,
        kl_reduction: Literal["batchmean", "mean"] = "mean",
        replays: int | None = None,
    ) -> None:
        super().__init__()
        self.kd_weight, self.ce_weight, self.temperature = kd_weight, ce_weight, temperature
        self.epsilon, self.step_size, self.steps = epsilon, step_size, steps
        self.tau_squared, self.kl_reduction = tau_squared, kl_reduction
        above_zero("temperature", temperature, 30)
        above_zero("step_size", step_size, 2)
        at_least_zero("kd_weight", kd_weight, 1)
        at_least_zero("ce_weight", ce_weight, 0)
        at_least_zero("epsilon", epsilon, 8)
        at_least_zero("steps", steps, 10)
        if replays is not None and replays < 2:
            raise RecipeError(
                f"distill.replays = {replays} is not valid",
                allowed="expected: 2 or more, or null for an attack of its own for every batch",
                fix="--set distill.replays=8",
                key="distill.replays",
            )
        self.fast, self.replays = replays is not None, replays or 1
        self.mean: Tensor
        self.std: Tensor
        self._next = torch.empty(0)  # what the last backward pass made of the attacked images, between replays

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Remember what images are: what black and white are after normalisation."""
        self.register_buffer("mean", setting.mean, persistent=False)
        self.register_buffer("std", setting.std, persistent=False)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, kd: scalar}."""
        tau = value_at(self.temperature, step.progress)
        attacked = self._on_the_way(step) if self.fast else self._attacked(step)
        logits = step.student(attacked).float()
        step.record("accuracy_attacked", (logits.argmax(1) == step.y).float().mean())
        kl = divergence(step.teacher_logits, logits, tau) * (tau**2 if self.tau_squared else 1)
        scale = value_at(self.kd_weight, step.progress) / (logits.shape[1] if self.kl_reduction == "mean" else 1)
        return {
            "ce": value_at(self.ce_weight, step.progress) * F.cross_entropy(step.student_logits, step.y),
            "kd": scale * kl,
        }

    def _attacked(self, step: Step) -> Tensor:
        """The batch [B, C, H, W], attacked from the start."""
        epsilon, step_size = value_at(self.epsilon, step.progress), value_at(self.step_size, step.progress)
        ball = Ball.of(epsilon, step_size, self.mean, self.std)
        with evaluating(step.student):
            return pgd(lambda x: F.cross_entropy(step.student(x).float(), step.y), step.x, ball, self.steps)

    def _on_the_way(self, step: Step) -> Tensor:
        """The batch as attacked so far; this step's backward pass takes the attack a step further."""
        epsilon = value_at(self.epsilon, step.progress)
        ball = Ball.of(epsilon, epsilon, self.mean, self.std)
        attacked = (random_start(step.x, ball) if step.replay == 0 else self._next).requires_grad_()

        def go_on(gradient: Tensor) -> None:
            self._next = ball.nearest(attacked.detach() + ball.step_size * gradient.sign(), step.x)

        attacked.register_hook(go_on)
        return attacked
