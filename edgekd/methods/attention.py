"""Attention transfer.

Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks
via Attention Transfer", ICLR 2017, eq. 1 and 2, activation-based. A map's attention is its energy at every site,

    Q = vec( sum_c A_c^2 ),     L = ce_weight CE + weight sum_j mean ( Q_S,j / ||Q_S,j|| - Q_T,j / ||Q_T,j|| )^2

The paper prints the norm of the difference; the authors' code takes the mean of its squares, with weight 1000, and so
do we. Maps of different height and width are averaged down to the smaller.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from edgekd.methods import Step
from edgekd.methods.features import FeatureMethod, same_size
from edgekd.methods.options import at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at


@register("method", "attention")
class AttentionTransfer(FeatureMethod):
    """The student looks where the teacher looks: normalised maps of activation energy are matched.

    weight: of the sum over the pairs of taps. ce_weight: weight of the cross-entropy.
    student_taps, teacher_taps: module paths, in pairs; null is the ends of all stages of edgekd's own networks.
    """

    tasks = None

    def __init__(
        self,
        *,
        weight: float | Schedule = 1000.0,
        ce_weight: float | Schedule = 1.0,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.weight, self.ce_weight = weight, ce_weight
        at_least_zero("weight", weight, 1000)
        at_least_zero("ce_weight", ce_weight, 1)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, attention: scalar}."""
        maps = [same_size(*pair) for pair in self.pairs(step)]
        differences = [F.mse_loss(attention(student), attention(teacher)) for student, teacher in maps]
        return {
            "ce": value_at(self.ce_weight, step.progress) * step.label_loss(),
            "attention": value_at(self.weight, step.progress) * sum(differences, step.x.new_zeros(())),
        }


def attention(feature: Tensor) -> Tensor:
    """[B, H W] of a map [B, C, H, W]: its energy by site, each sample's of norm 1."""
    return F.normalize(feature.square().sum(1).flatten(1))
