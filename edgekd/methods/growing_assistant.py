"""An assistant that grows between student and teacher while both learn.

After Xu et al., "Efficient knowledge distillation for liver CT segmentation using growing assistant
network" (GTAN), Physics in Medicine and Biology 66(23), 2021, of which the abstract was read: an assistant grows from
the student toward the teacher, and the student distils from it; and after Mirzadeh et al., "Improved Knowledge
Distillation via Teacher Assistant" (TAKD), AAAI 2020. How the assistant grows is a reconstruction [R]. With A the
assistant, S the student, T the teacher, at every step of one training

    L = ce_weight CE(z_S, y) + kd_weight tau^2 KL(z_A || z_S)     z_A a constant in the student's part
      + ce_weight CE(z_A, y) + kd_weight tau^2 KL(z_T || z_A)

    z_A = z_S + sum over groups g < s of scale_g z_g        in phase s of `groups` phases of equal length

The assistant starts as the student itself, which so learns from the teacher at first; then it gets one more group in
each phase. A group is a network of the student's architecture with weights of its own: together they are a network of s
times the student's width whose channels form s groups. A new one comes in with scale 0, so growing changes no output,
as in net2net (Chen, Goodfellow, Shlens, ICLR 2016), and needs no knowledge of the network's graph: any architecture can
grow, where net2net's rules for wider layers would have to follow shortcuts and concatenations. A group costs nothing
before its phase.
In segmentation the divergences are of every pixel and their mean is taken, with 1 - soft Dice of both networks beside
it, as in `kd`; the loss on the labels is the task's.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from edgekd.errors import RecipeError
from edgekd.methods import Method, Setting, Step
from edgekd.methods.divergence import from_teacher, softening
from edgekd.methods.kd import KD
from edgekd.methods.options import above_zero, at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at


@register("method", "growing_assistant")
class GrowingAssistant(Method):
    """The student learns from an assistant that learns from the teacher and grows, group by group, as they train.

    groups: student-sized parts of the assistant in the end, the student among them, and phases of the training.
    kd_weight: of the divergences. ce_weight: of the labels. temperature: tau; null is the task's: 4 for classes, 1 for
    every pixel.
    """

    tasks = ("classification", "segmentation")
    uses_all_parameters = False  # a group is used from its phase on

    def __init__(
        self,
        *,
        groups: int = 4,
        kd_weight: float | Schedule = 0.7,
        ce_weight: float | Schedule = 0.3,
        temperature: float | Schedule | None = None,
    ) -> None:
        super().__init__()
        self.kd_weight, self.ce_weight, self.temperature = kd_weight, ce_weight, temperature
        if temperature is not None:
            above_zero("temperature", temperature, 4)
        at_least_zero("kd_weight", kd_weight, 0.7)
        at_least_zero("ce_weight", ce_weight, 0.3)
        if groups < 2:
            raise RecipeError(
                f"distill.groups = {groups} is not valid",
                allowed="expected: 2 or more; an assistant of one group does not grow",
                fix="--set distill.groups=4",
                key="distill.groups",
            )
        self.count = groups
        self.groups = nn.ModuleList()

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Make the groups beside the student, each with weights of its own by the layers' usual initialisation."""
        for _ in range(self.count - 1):
            group = copy.deepcopy(student).requires_grad_(True).train()
            for module in group.modules():
                if callable(initialise := getattr(module, "reset_parameters", None)):
                    initialise()
            self.groups.append(group)
        self.scale = nn.Parameter(torch.zeros(self.count - 1, device=setting.example.device))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce, kd: the student's scalars; assistant_ce, assistant_kd: the assistant's}; joint for pixels."""
        tau, kd_weight = softening(self.temperature, step), value_at(self.kd_weight, step.progress)
        ce_weight, weights = value_at(self.ce_weight, step.progress), (kd_weight * tau**2, kd_weight)
        phase = min(self.count, 1 + int(step.progress * self.count))
        logits = self.assistant(step.student_logits, step.x, phase)
        step.record("groups", phase)
        step.record("assistant_score", step.task.batch_score(logits.detach(), step.y))
        return {
            "ce": ce_weight * step.label_loss(),
            **from_teacher(step, logits.detach(), step.student_logits, weights, tau),
            "assistant_ce": ce_weight * step.task.loss(logits, step.y),
            **from_teacher(step, step.teacher_logits, logits, weights, tau, "assistant_"),
        }

    def finetuning(self) -> Method:
        """The student has learned from the assistant: as in the first phase, where it is the assistant, it learns from
        the teacher itself."""
        return KD(kd_weight=self.kd_weight, ce_weight=self.ce_weight, temperature=self.temperature)

    def assistant(self, student_logits: Tensor, x: Tensor, phase: int) -> Tensor:
        """The logits [B, K] of the assistant as large as in this phase, 1 to `groups`, for images [B, C, H, W]."""
        grown = [self.scale[number] * group(x).float() for number, group in enumerate(self.groups[: phase - 1])]
        return torch.stack([student_logits, *grown]).sum(0)
