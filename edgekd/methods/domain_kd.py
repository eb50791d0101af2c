"""Distillation and adaptation to another domain at once, progressively.

Nguyen-Meidine, Belal, Kiran, Dolz, Blais-Morin, Granger, "Unsupervised domain adaptation and knowledge distillation",
arXiv 2005.07839, and its code. A copy of the teacher learns what source (labelled) and target (unlabelled) have in
common, while the student learns from it on both:

    teacher:  (1 - beta) [ CE(source) + gamma MMD(features of source, features of target) ]
    student:  beta [ (1 - alpha) CE(source) + alpha tau^2 KL(source) + tau^2 KL(target) ]
    beta = beta_0 exp(g e) from 0.1 to 0.9,      gamma = 2 / (1 + exp(-10 i / N)) - 1 within each epoch of N batches

MMD has five Gaussian kernels whose widths differ by factors of 2 around the mean squared distance, and is the biased
mean of XX + YY - XY - YX over pooled features. alpha 0.3, tau 20. The teacher's learning rate falls as
lr / (1 + 10 p)^0.75. Where this differs: the code's KL(student || teacher) with an absolute value, whose gradient goes
to both networks, is KL(teacher || student) here with the teacher detached [R, our choice]; both networks move in the
same step instead of in turn, as they share no gradient.
The teacher that the recipe names stays as it is. The published results are not known here.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.methods import Method, Setting, Step
from edgekd.methods.divergence import divergence
from edgekd.methods.features import pooled
from edgekd.methods.options import above_zero, at_least_zero, from_zero_to_one
from edgekd.methods.taps import Taps, one_tap
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at

KERNELS, FACTOR = 5, 2.0
# Progress is a quotient of batches: at the start of an epoch it may fall short by rounding.
ROUNDING = 1e-9


@register("method", "domain_kd")
class DomainKD(Method):
    """The teacher adapts to the target domain, data.target_domain, while the student learns from it on both domains.

    beta: weight of the student's loss, and 1 - beta that of the teacher's. alpha: share of KL on the source.
    temperature: tau. teacher_lr: of the teacher's copy; 0 leaves it as the teacher is.
    teacher_taps: path of the features that are aligned, a map or an embedding; null is that before the logits of
    edgekd's own networks.
    """

    needs_target = True

    def __init__(
        self,
        *,
        beta: float | Schedule = {"exponential": [0.1, 0.9]},  # noqa: B006 - read, never changed
        alpha: float | Schedule = 0.3,
        temperature: float | Schedule = 20.0,
        teacher_lr: float | Schedule = 0.001,
        teacher_taps: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.beta, self.alpha, self.temperature = beta, alpha, temperature
        self.teacher_lr, self.paths = teacher_lr, teacher_taps
        above_zero("temperature", temperature, 20)
        from_zero_to_one("beta", beta, 0.3)
        from_zero_to_one("alpha", alpha, 0.3)
        at_least_zero("teacher_lr", teacher_lr, 0.001)
        self._optimizer: torch.optim.Optimizer | None = None

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Copy the teacher, and tap the copy."""
        assert teacher is not None
        self.adapted = copy.deepcopy(teacher).requires_grad_(True).train()
        self._taps = Taps(self.adapted, [one_tap(self.paths, teacher, "teacher")], "teacher")
        self._taps.probe(self.adapted, setting.example)
        self.epochs = setting.epochs

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The copy's: SGD with momentum 0.9 and weight decay 5e-4, as in the authors' code."""
        self._optimizer = torch.optim.SGD(
            self.adapted.parameters(), lr=value_at(self.teacher_lr, 0.0), momentum=0.9, weight_decay=5e-4
        )
        return [self._optimizer]

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce, kd_source, kd_target: of the student; teacher_ce, teacher_mmd: of the teacher's copy; scalars}."""
        beta, alpha, tau = (value_at(option, step.progress) for option in (self.beta, self.alpha, self.temperature))
        within = (step.progress * self.epochs + ROUNDING) % 1  # of the epoch
        gamma = 2 / (1 + math.exp(-10 * within)) - 1
        if self._optimizer is not None:
            lr = value_at(self.teacher_lr, step.progress) / (1 + 10 * step.progress) ** 0.75
            self._optimizer.param_groups[0]["lr"] = lr
        (source, source_features), (target, target_features) = self._adapted(step.x), self._adapted(step.target)
        student_target = step.student(step.target).float()
        weight = beta * tau**2
        return {
            "ce": beta * (1 - alpha) * F.cross_entropy(step.student_logits, step.y),
            "kd_source": weight * alpha * divergence(source.detach(), step.student_logits, tau),
            "kd_target": weight * divergence(target.detach(), student_target, tau),
            "teacher_ce": (1 - beta) * F.cross_entropy(source, step.y),
            "teacher_mmd": (1 - beta) * gamma * discrepancy(source_features, target_features),
        }

    def _adapted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and pooled features [B, D] of the teacher's copy."""
        with self._taps.recording() as seen:
            logits = self.adapted(x).float()
        return logits, pooled(*seen.values())


def discrepancy(first: Tensor, second: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of [N, D] and [M, D], biased, over five Gaussian kernels: a scalar.

    Gretton, Borgwardt, Rasch, Schölkopf, Smola, JMLR 13, 2012, eq. 5; the widths carry no gradient.
    """
    both = torch.cat([first, second])
    distances = (both[:, None] - both[None]).square().sum(2)
    width = distances.detach().sum() / (len(both) * (len(both) - 1)) / FACTOR ** (KERNELS // 2)
    width = width.clamp_min(torch.finfo(width.dtype).tiny)
    kernel = torch.stack([(-distances / (width * FACTOR**number)).exp() for number in range(KERNELS)]).sum(0)
    n = len(first)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - kernel[:n, n:].mean() - kernel[n:, :n].mean()
