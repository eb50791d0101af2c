"""Knowledge review: deep features of the student are compared with shallow ones of the teacher.

Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, eq. 8 to 10. From the deepest tap up, the
student's map is projected and fused with what came from below (attention-based fusion, ABF), then compared with the
teacher's map of that level by the mean square over a pyramid of poolings (hierarchical context loss, HCL):

    z = P(s_l);  [a, b] = sigmoid(conv1x1([z, up(u_{l+1})]));  u_l = a z + b up(u_{l+1});  f_l = conv3x3(u_l)
    HCL(f, t) = ( mse(f, t) + 1/2 mse_4x4 + 1/4 mse_2x2 + 1/8 mse_1x1 ) / (1 + 1/2 + 1/4 + 1/8)
    L = ce_weight CE + weight sum_l HCL(f_l, t_l)

As in the authors' code: poolings that are not smaller than the map are left out, projections and outputs end in batch
normalisation, the middle has min(512, channels of the deepest tap), and the weight rises linearly over the first 20 of
240 epochs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.methods import Setting, Step
from edgekd.methods.features import FeatureMethod
from edgekd.methods.options import at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at

POOLINGS = (4, 2, 1)
WIDEST = 512


@register("method", "review")
class Review(FeatureMethod):
    """Each level of the teacher is learned by all deeper levels of the student, fused by attention.

    weight: of the sum over the levels. ce_weight: weight of the cross-entropy.
    student_taps, teacher_taps: module paths from shallow to deep, in pairs; null is the ends of all stages of edgekd's
    own networks.
    """

    tasks = None

    def __init__(
        self,
        *,
        weight: float | Schedule = {"linear": [0.0, 1.0, 0.083]},  # noqa: B006 - read, never changed
        ce_weight: float | Schedule = 1.0,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.weight, self.ce_weight = weight, ce_weight
        at_least_zero("weight", weight, 1)
        at_least_zero("ce_weight", ce_weight, 1)
        self.fusions = nn.ModuleList()

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Make one fusion for each level, the deepest first."""
        super().attach(student, teacher, setting)
        middle = min(WIDEST, self.student_sizes[-1][0])
        sizes = list(zip(self.student_sizes, self.teacher_sizes, strict=True))[::-1]
        for level, (inputs, outputs) in enumerate(sizes):
            self.fusions.append(Fusion(inputs[0], middle, outputs[0], fuses=level > 0))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, review: scalar}."""
        losses, below = [], None
        for fusion, (student, teacher) in zip(self.fusions, reversed(self.pairs(step)), strict=True):
            below, output = fusion(student, below, teacher.shape[2:])
            losses.append(hierarchical_context(output.float(), teacher))
        return {
            "ce": value_at(self.ce_weight, step.progress) * step.label_loss(),
            "review": value_at(self.weight, step.progress) * torch.stack(losses).sum(),
        }


class Fusion(nn.Module):
    """ABF: a student's map and the fused one of the level below, at the size of the teacher's map."""

    def __init__(self, inputs: int, middle: int, outputs: int, *, fuses: bool) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.attend = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuses else None
        self.output = nn.Sequential(nn.Conv2d(middle, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, feature: Tensor, below: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] and [B, middle, h, w] to the fused [B, middle, *size] and the output [B, C', *size]."""
        fused: Tensor = self.project(feature)
        if fused.shape[2:] != size:
            fused = F.interpolate(fused, tuple(size))
        if self.attend is not None and below is not None:
            below = F.interpolate(below, tuple(size))
            shares = self.attend(torch.cat((fused, below), 1))
            fused = fused * shares[:, :1] + below * shares[:, 1:]
        return fused, self.output(fused)


def hierarchical_context(feature: Tensor, other: Tensor) -> Tensor:
    """HCL of two maps [B, C, H, W]: a scalar."""
    loss, weight, total = F.mse_loss(feature, other), 1.0, 1.0
    for side in POOLINGS:
        if side < min(feature.shape[2:]):
            weight /= 2
            total += weight
            loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(feature, side), F.adaptive_avg_pool2d(other, side))
    return loss / total
