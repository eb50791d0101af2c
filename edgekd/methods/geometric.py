"""Geometric regularisation of local activations.

After Theodorakopoulos, Fotopoulou, Economou, Information 12(8):333, 2021, of which the abstract alone was read: the
channel vectors at the sites of a map shall have the neighbourhoods that they have in the teacher. The formulas are a
reconstruction [R]. Per image and pair of taps, both maps on one grid, N sites, D the distances of all pairs of sites,
divided by their mean:

    affinity   P = softmax over j != i of (-D_ij / temperature);  mean over i of KL(P_T || P_S)
    contrast   -mean over i of log( sum over i's k nearest sites in the teacher of exp(-D_S,ij / temperature)
                                    / sum over all j != i of it )

    L = ce_weight CE + weight * sum over the pairs

Distances know nothing of rotation, scale or number of channels, so student and teacher may differ in all of them. The
cost grows with N^2: of larger maps `sites` are drawn anew for every batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import RecipeError
from edgekd.methods import Setting, Step
from edgekd.methods.features import FeatureMethod, same_size
from edgekd.methods.options import above_zero, at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at

# Under the square root, whose slope is infinite at 0.
EPSILON = 1e-12


@register("method", "geometric")
class Geometric(FeatureMethod):
    """The sites of a feature map have the neighbours that they have in the teacher's map.

    weight: of the sum over the pairs of taps. ce_weight: weight of the cross-entropy. form: of the loss, see the file.
    temperature: of the affinities, in mean distances. neighbours: k of the contrast. sites: at most so many of a map.
    student_taps, teacher_taps: module paths, in pairs; null is the ends of all stages of edgekd's own networks.
    """

    def __init__(
        self,
        *,
        weight: float | Schedule = 1.0,
        ce_weight: float | Schedule = 1.0,
        form: Literal["affinity", "contrast"] = "affinity",
        temperature: float | Schedule = 0.5,
        neighbours: int = 4,
        sites: int = 64,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.weight, self.ce_weight, self.form, self.temperature = weight, ce_weight, form, temperature
        self.neighbours, self.sites = neighbours, sites
        above_zero("temperature", temperature, 0.5)
        above_zero("neighbours", neighbours, 4)
        above_zero("sites", sites, 64)
        at_least_zero("weight", weight, 1)
        at_least_zero("ce_weight", ce_weight, 1)

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Place the taps. Raises RecipeError when a map has too few sites to have neighbours."""
        super().attach(student, teacher, setting)
        for path, inputs, outputs in zip(self.student_taps.paths, self.student_sizes, self.teacher_sizes, strict=True):
            common = min(inputs[1], outputs[1]) * min(inputs[2], outputs[2])
            if min(common, self.sites) < 3:
                raise RecipeError(
                    f'"{path}" and its pair have {min(common, self.sites)} sites in common, and geometry needs 3',
                    allowed="expected: maps of 3 sites or more, and distill.sites from 3",
                    fix="tap earlier modules, or larger images",
                    key="distill.student_taps",
                )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, geometric: scalar}."""
        loss = step.x.new_zeros(())
        for pair in self.pairs(step):
            student, teacher = same_size(*pair)
            chosen = torch.randperm(student.shape[2] * student.shape[3], device=step.x.device)[: self.sites]
            own, wanted = (site_distances(one.flatten(2)[:, :, chosen]) for one in (student, teacher))
            loss = loss + self._compared(own, wanted, value_at(self.temperature, step.progress))
        return {
            "ce": value_at(self.ce_weight, step.progress) * F.cross_entropy(step.student_logits, step.y),
            "geometric": value_at(self.weight, step.progress) * loss,
        }

    def _compared(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        itself = torch.eye(student.shape[1], dtype=torch.bool, device=student.device)
        others = len(itself) - 1
        own, wanted = ((-away[:, ~itself] / temperature).view(-1, others).log_softmax(1) for away in (student, teacher))
        if self.form == "affinity":
            return F.kl_div(own, wanted, reduction="batchmean", log_target=True)
        nearest = wanted.topk(min(self.neighbours, others), dim=1).indices
        return -own.gather(1, nearest).logsumexp(1).mean()


def site_distances(sites: Tensor) -> Tensor:
    """[B, N, N] distances of the N channel vectors of [B, C, N], in units of their mean."""
    squares = sites.square().sum(1)
    squared = squares[:, :, None] + squares[:, None] - 2 * sites.transpose(1, 2) @ sites
    away = squared.clamp(min=EPSILON).sqrt() * ~torch.eye(sites.shape[2], dtype=torch.bool, device=sites.device)
    pairs = sites.shape[2] * (sites.shape[2] - 1)
    return away / (away.sum((1, 2), keepdim=True) / pairs).clamp(min=EPSILON)
