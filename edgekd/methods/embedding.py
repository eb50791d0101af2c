"""Distillation of an embedding: the student's points lie where the teacher's lie, and to each other as these do.

    L = direction_weight * mean_i (1 - cos(s_i, t_i))
      + relation_weight * mean_ij (cos(s_i, s_j) - cos(t_i, t_j))^2 + label_weight * L_task

The first term is the cosine form of feature matching that face and retrieval networks are distilled by; the second
compares all pairs of a batch, as similarity-preserving distillation does (F. Tung, G. Mori, ICCV 2019, eq. 4), with
cosines in place of row-normalised products, since cosines are what neighbours are found by.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from edgekd.methods import Method, Step
from edgekd.methods.options import at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at


@register("method", "embedding")
class Embedding(Method):
    """The student's points lie where the teacher's do, and as these do to each other.

    direction_weight: of the angle between student's and teacher's point. relation_weight: of the similarities of all
    pairs in a batch. label_weight: of the task's loss on the labels.
    """

    tasks = ("embedding",)

    def __init__(
        self,
        *,
        direction_weight: float | Schedule = 1.0,
        relation_weight: float | Schedule = 1.0,
        label_weight: float | Schedule = 0.3,
    ) -> None:
        super().__init__()
        self.direction_weight, self.relation_weight = direction_weight, relation_weight
        self.label_weight = label_weight
        at_least_zero("direction_weight", direction_weight, 1)
        at_least_zero("relation_weight", relation_weight, 1)
        at_least_zero("label_weight", label_weight, 0.3)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{direction: scalar, relation: scalar, task: scalar}."""
        student, teacher = (F.normalize(points, dim=1) for points in (step.student_logits, step.teacher_logits))
        direction = (1 - (student * teacher).sum(1)).mean()
        relation = F.mse_loss(student @ student.T, teacher @ teacher.T)
        return {
            "direction": value_at(self.direction_weight, step.progress) * direction,
            "relation": value_at(self.relation_weight, step.progress) * relation,
            "task": value_at(self.label_weight, step.progress) * step.label_loss(),
        }
