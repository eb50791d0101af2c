"""Attentions that the task drives, level by level, and a discriminator on the outputs.

After Li et al., "Knowledge squeezed adversarial network compression" (HKSANC), AAAI 2020, pp. 11370-11377 (earlier as
KSANC, arXiv 1904.05100), of which the abstract alone was read: adversarial training on the outputs, intermediate
supervision by a hierarchy of task-driven attentions, knowledge squeezed to what a small student can take. The formulas
and all numbers are a reconstruction [R].

At every tapped level l a linear head learns the task from the spatial mean of the map F_l alone, in either network, and
no gradient of it goes there. The gradient of the label's score by the map is the head's row w_y of the label (up to
the number of sites), and the task's attention is Grad-CAM's (Selvaraju et al., ICCV 2017) of that head,

    A_l = ReLU( sum_c w_y,c F_l,c ),  brought to the smaller grid of the two networks and to length 1

A discriminator D reads logits and says both whether they are the teacher's and which class they are of:

    D minimises     -E log D(z_T) - E log(1 - D(z_S)) + CE(D's classes of z_T, y) + CE(D's classes of z_S, y)
    heads minimise  sum_l CE(head_T,l, y) + CE(head_S,l, y)
    the student:    L = ce_weight CE + kd_weight tau^2 KL(z_T || z_S) - adversarial_weight E log D(z_S)
                        + attention_weight sum_l mean over the batch of || A_T,l - A_S,l ||^2

D is an MLP of 128, 256 and 128 units, moved by its own Adam with weight decay, which is its regulariser. The squares
are at most 2 a level. The discriminator's accuracy, 1/2 where it cannot tell them apart, is in the training log.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.methods import Setting, Step
from edgekd.methods.discriminator import discriminator, judged, moved_by_adam
from edgekd.methods.divergence import divergence
from edgekd.methods.features import FeatureMethod, pooled, same_size
from edgekd.methods.options import above_zero, at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at

HIDDEN, WEIGHT_DECAY = (128, 256, 128), 1e-4


@register("method", "squeezed_adversarial")
class SqueezedAdversarial(FeatureMethod):
    """The task looks where it looks in the teacher's maps, and a discriminator takes the logits for the teacher's.

    attention_weight: of the sum over the levels. adversarial_weight: of the discriminator's verdict. kd_weight,
    temperature: of the divergence. ce_weight: weight of the cross-entropy.
    student_taps, teacher_taps: module paths, in pairs; null is the ends of all stages of edgekd's own networks.
    """

    def __init__(
        self,
        *,
        attention_weight: float | Schedule = 0.1,
        adversarial_weight: float | Schedule = 0.1,
        kd_weight: float | Schedule = 0.7,
        ce_weight: float | Schedule = 0.3,
        temperature: float | Schedule = 4.0,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.attention_weight, self.adversarial_weight = attention_weight, adversarial_weight
        self.kd_weight, self.ce_weight, self.temperature = kd_weight, ce_weight, temperature
        above_zero("temperature", temperature, 4)
        at_least_zero("attention_weight", attention_weight, 0.1)
        at_least_zero("adversarial_weight", adversarial_weight, 0.1)
        at_least_zero("kd_weight", kd_weight, 0.7)
        at_least_zero("ce_weight", ce_weight, 0.3)
        self.student_heads, self.teacher_heads = nn.ModuleList(), nn.ModuleList()

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Make a head for every level of both networks, and the discriminator."""
        super().attach(student, teacher, setting)
        self.student_heads.extend(nn.Linear(size[0], setting.num_classes) for size in self.student_sizes)
        self.teacher_heads.extend(nn.Linear(size[0], setting.num_classes) for size in self.teacher_sizes)
        self.judge = discriminator(setting.num_classes, HIDDEN, 1 + setting.num_classes)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The discriminator's own."""
        return [moved_by_adam(self.judge, WEIGHT_DECAY)]

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce, kd, adversarial, attention: scalars; heads, discriminator: scalars, for them alone}."""
        tau, logits = value_at(self.temperature, step.progress), step.student_logits
        away, tasks = [], []
        levels = zip(self.pairs(step), self.student_heads, self.teacher_heads, strict=True)
        for maps, *heads in levels:
            student, teacher = same_size(*(attention(one, head, step.y) for one, head in zip(maps, heads, strict=True)))
            away.append((directions(student) - directions(teacher)).square().sum(1).mean())
            tasks += [
                F.cross_entropy(head(pooled(one.detach())), step.y) for one, head in zip(maps, heads, strict=True)
            ]
        fooled = F.softplus(-judged(self.judge, logits)[:, 0]).mean()  # -log D(z_S)
        return {
            "ce": value_at(self.ce_weight, step.progress) * F.cross_entropy(logits, step.y),
            "kd": value_at(self.kd_weight, step.progress) * tau**2 * divergence(step.teacher_logits, logits, tau),
            "adversarial": value_at(self.adversarial_weight, step.progress) * fooled,
            "attention": value_at(self.attention_weight, step.progress) * torch.stack(away).sum(),
            "heads": torch.stack(tasks).sum(),
            "discriminator": self._judging(step),
        }

    def _judging(self, step: Step) -> Tensor:
        """The discriminator's own loss: a scalar."""
        own, real = self.judge(step.student_logits.detach()), self.judge(step.teacher_logits)
        step.record("discriminator_accuracy", torch.cat((own[:, 0] < 0, real[:, 0] > 0)).float().mean())
        told = F.softplus(own[:, 0]).mean() + F.softplus(-real[:, 0]).mean()
        return told + F.cross_entropy(own[:, 1:], step.y) + F.cross_entropy(real[:, 1:], step.y)


def attention(feature: Tensor, head: nn.Module, y: Tensor) -> Tensor:
    """[B, 1, H, W] of a map [B, C, H, W]: where its head finds the label; no gradient to the head."""
    weights: Tensor = head.get_parameter("weight").detach()[y]
    return torch.einsum("bc,bchw->bhw", weights, feature)[:, None].relu()


def directions(attentions: Tensor) -> Tensor:
    """[B, H * W] of length 1, or 0 where nothing speaks for the label."""
    return F.normalize(attentions.flatten(1), dim=1)
