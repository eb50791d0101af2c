"""Distillation with samples at the teacher's decision boundary.

Heo, Lee, Yun, Choi, "Knowledge Distillation with Adversarial Samples Supporting Decision Boundary" (BSS), AAAI 2019, as
in the authors' code. A boundary-supporting sample is a training image that the teacher was attacked with until it
turned to another class, see `attacks.boundary`. With H the cross-entropy of softened probabilities (tau 3, no tau^2),

    L = CE + kd_weight H(teacher(x), student(x)) + boundary_weight H(teacher(x'), student(x'))

kd_weight falls from 4 to 1, boundary_weight from 2 to 0 at three quarters of the training. Images that both networks
tell right are attacked, at most `samples` of a batch: those of the largest sum over the wrong classes of (p_T - p_S)^2.
The class that an attack aims at is drawn with p_T(k) / (1 - p_T(y)). As in the code all attacked samples are used,
those that did not turn too; a single one is not, because batch normalisation learns nothing from it. They stay between
black and white, where the code has -2.5 and 2.5 of the normalised images.

The training log has the share that turned, and how alike the changes x' - x are when the student is attacked in the
same way, for some of the images: `magsim`, mean of min(|u|, |v|) / max(|u|, |v|), and `angsim`, mean cos(u, v). The
paper's formulas of the two were not seen; these are a reconstruction [R]. In batches without such images they are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekd.methods import Method, Setting, Step
from edgekd.methods.attacks import boundary, evaluating, limits
from edgekd.methods.options import above_zero, at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at

# Of how many images the student's boundary is looked for too: it costs as many passes as the teacher's.
COMPARED = 8
FEWEST = 2


@register("method", "bss")
class BSS(Method):
    """The student also learns images that the teacher was attacked with until it was about to answer otherwise.

    kd_weight: of the teacher's answers to the batch. boundary_weight: of those to the boundary samples. ce_weight:
    weight of the cross-entropy. temperature: tau. samples: attacked of a batch, at most.
    step_size: of the attack, in units of the normalised images. steps: of the attack, at most.
    """

    def __init__(
        self,
        *,
        kd_weight: float | Schedule = {"linear": [4.0, 1.0]},  # noqa: B006 - read, never changed
        boundary_weight: float | Schedule = {"linear": [2.0, 0.0, 0.75]},  # noqa: B006
        ce_weight: float | Schedule = 1.0,
        temperature: float | Schedule = 3.0,
        samples: int = 64,
        step_size: float | Schedule = 0.3,
        steps: int = 10,
    ) -> None:
        super().__init__()
        self.kd_weight, self.boundary_weight, self.ce_weight = kd_weight, boundary_weight, ce_weight
        self.temperature, self.samples, self.step_size, self.steps = temperature, samples, step_size, steps
        above_zero("temperature", temperature, 3)
        above_zero("samples", samples, 64)
        above_zero("step_size", step_size, 0.3)
        above_zero("steps", steps, 10)
        at_least_zero("kd_weight", kd_weight, 4)
        at_least_zero("boundary_weight", boundary_weight, 2)
        at_least_zero("ce_weight", ce_weight, 1)
        self.lowest: Tensor
        self.highest: Tensor

    def attach(self, student: torch.nn.Module, teacher: torch.nn.Module | None, setting: Setting) -> None:
        """Remember what black and white are after normalisation."""
        lowest, highest = limits(setting.mean, setting.std)
        self.register_buffer("lowest", lowest, persistent=False)
        self.register_buffer("highest", highest, persistent=False)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, kd: scalar, boundary: scalar}."""
        tau, weight = value_at(self.temperature, step.progress), value_at(self.boundary_weight, step.progress)
        kd = value_at(self.kd_weight, step.progress) * soft_cross_entropy(step.teacher_logits, step.student_logits, tau)
        at_boundary = weight * self._at_boundary(step, tau) if weight else kd.new_zeros(())
        return {
            "ce": value_at(self.ce_weight, step.progress) * F.cross_entropy(step.student_logits, step.y),
            "kd": kd,
            "boundary": at_boundary,
        }

    def _at_boundary(self, step: Step, tau: float) -> Tensor:
        """The cross-entropy on the boundary samples of this batch: a scalar."""
        chosen = base_samples(step.teacher_logits, step.student_logits.detach(), step.y, self.samples)
        if len(chosen) < FEWEST:
            for name in ("boundary_turned", "magsim", "angsim"):
                step.record(name, 0.0)
            return step.student_logits.new_zeros(())
        x, y = step.x[chosen], step.y[chosen]
        others = step.teacher_logits[chosen].scatter(1, y[:, None], float("-inf"))
        target = torch.multinomial(others.softmax(1), 1)[:, 0]
        step_size = value_at(self.step_size, step.progress)
        attacked, turned = boundary(step.ask_teacher, x, y, target, self.lowest, self.highest, step_size, self.steps)
        step.record("boundary_turned", turned.float().mean())
        self._compare(step, x[:COMPARED], y[:COMPARED], target[:COMPARED], attacked[:COMPARED])
        return soft_cross_entropy(step.ask_teacher(attacked).detach(), step.student(attacked).float(), tau)

    def _compare(self, step: Step, x: Tensor, y: Tensor, target: Tensor, of_teacher: Tensor) -> None:
        with evaluating(step.student):
            of_student, _ = boundary(
                lambda one: step.student(one).float(), x, y, target, self.lowest, self.highest,
                value_at(self.step_size, step.progress), self.steps,
            )  # fmt: skip
        magnitude, angle = similarity(of_teacher - x, of_student - x)
        step.record("magsim", magnitude)
        step.record("angsim", angle)


def soft_cross_entropy(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of softened [B, K] logits with the teacher's softened probabilities: a scalar."""
    return F.cross_entropy(student_logits / temperature, (teacher_logits / temperature).softmax(1))


def base_samples(teacher_logits: Tensor, student_logits: Tensor, y: Tensor, most: int) -> Tensor:
    """Which rows [M] of [B, K] logits are attacked: told right by both, and of those where they differ most."""
    right = (teacher_logits.argmax(1) == y) & (student_logits.argmax(1) == y)
    squares = (teacher_logits.softmax(1) - student_logits.softmax(1)).square().scatter(1, y[:, None], 0.0).sum(1)
    order = torch.where(right, squares, -1.0).argsort(descending=True, stable=True)
    return order[: min(most, int(right.sum()))]


def similarity(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """MagSim and AngSim of two sets of changes [B, ...]: scalars; 0 for a change that is none."""
    u, v = first.flatten(1), second.flatten(1)
    lengths = torch.stack((u.norm(dim=1), v.norm(dim=1)))
    magnitude = lengths.amin(0) / lengths.amax(0).clamp(min=torch.finfo(lengths.dtype).tiny)
    return magnitude.mean(), F.cosine_similarity(u, v, dim=1).mean()
