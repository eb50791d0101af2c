"""Relational knowledge distillation.

Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, eq. 4 to 9. Over the embeddings of a batch, with h
Huber's loss (threshold 1) and mu the mean distance of all pairs:

    distance   mean over pairs of    h( ||t_i - t_j|| / mu_T,  ||s_i - s_j|| / mu_S )
    angle      mean over triplets of h( cos of the angle at t_j between t_i and t_k,  the same of s )

    L = ce_weight CE + distance_weight * distance + angle_weight * angle

As in the authors' code the means run over all B^2 pairs and B^3 triplets, those of a sample with itself included (their
terms are 0), and mu over the pairs of different samples. Embeddings of any two sizes can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekd.methods import Step
from edgekd.methods.features import FeatureMethod
from edgekd.methods.options import at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at

# Under the square root: its gradient is infinite at 0.
EPSILON = 1e-12


@register("method", "rkd")
class RKD(FeatureMethod):
    """Distances and angles between the samples of a batch are those of the teacher's embeddings.

    distance_weight, angle_weight: of the two terms. ce_weight: weight of the cross-entropy.
    student_taps, teacher_taps: one module path each, whose maps are averaged over their sites; null is the embedding
    before the logits of edgekd's own networks. Several pairs are averaged.
    """

    place = "embedding"

    tasks = None

    def __init__(
        self,
        *,
        distance_weight: float | Schedule = 25.0,
        angle_weight: float | Schedule = 50.0,
        ce_weight: float | Schedule = 1.0,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.distance_weight, self.angle_weight, self.ce_weight = distance_weight, angle_weight, ce_weight
        at_least_zero("distance_weight", distance_weight, 25)
        at_least_zero("angle_weight", angle_weight, 50)
        at_least_zero("ce_weight", ce_weight, 1)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, distance: scalar, angle: scalar}."""
        pairs = self.pairs(step)
        by_distance, by_angle = (
            torch.stack([F.smooth_l1_loss(relation(student), relation(teacher)) for student, teacher in pairs]).mean()
            for relation in (relative_distances, cosines)
        )
        return {
            "ce": value_at(self.ce_weight, step.progress) * step.label_loss(),
            "distance": value_at(self.distance_weight, step.progress) * by_distance,
            "angle": value_at(self.angle_weight, step.progress) * by_angle,
        }


def distances(embedding: Tensor) -> Tensor:
    """[B, B] Euclidean distances of the rows of [B, D], 0 on the diagonal."""
    squares = embedding.square().sum(1)
    squared = squares[:, None] + squares[None, :] - 2 * embedding @ embedding.T
    away = ~torch.eye(len(embedding), dtype=torch.bool, device=embedding.device)
    return squared.clamp(min=EPSILON).sqrt() * away


def relative_distances(embedding: Tensor) -> Tensor:
    """`distances`, divided by their mean over different samples."""
    away = distances(embedding)
    return away / (away.sum() / max(1, len(away) * (len(away) - 1))).clamp(min=EPSILON)


def cosines(embedding: Tensor) -> Tensor:
    """[B, B, B]: the cosine of the angle at sample j between samples i and k, as [j, i, k]."""
    directions = F.normalize(embedding[None, :] - embedding[:, None], dim=2)
    return directions @ directions.transpose(1, 2)
