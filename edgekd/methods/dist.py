"""Distillation from a stronger teacher: relations are matched, not values.

Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, eq. 8 to 10. Y are the
softened outputs [B, K], rho is Pearson's correlation:

    L = ce_weight CE + beta tau^2 mean_b (1 - rho(Y_T[b, :], Y_S[b, :]))
                     + gamma tau^2 mean_k (1 - rho(Y_T[:, k], Y_S[:, k]))

The paper uses beta = gamma = 2 and tau = 4 on CIFAR-100, 1 and 1 on ImageNet. tau^2 is in the authors' code.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from edgekd.methods import Method, Step
from edgekd.methods.options import above_zero, at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at

# Keeps a constant row or column, whose correlation is not defined, at correlation 0.
EPSILON = 1e-8


@register("method", "dist")
class DIST(Method):
    """The student's outputs correlate with the teacher's, within each sample and within each class.

    beta: weight of the correlation over a sample's classes. gamma: of that over a class's samples in the batch.
    ce_weight: weight of the cross-entropy. temperature: tau, softens both outputs.
    """

    def __init__(
        self,
        *,
        beta: float | Schedule = 2.0,
        gamma: float | Schedule = 2.0,
        ce_weight: float | Schedule = 1.0,
        temperature: float | Schedule = 4.0,
    ) -> None:
        super().__init__()
        self.beta, self.gamma, self.ce_weight, self.temperature = beta, gamma, ce_weight, temperature
        above_zero("temperature", temperature, 4)
        for name, option in (("beta", beta), ("gamma", gamma), ("ce_weight", ce_weight)):
            at_least_zero(name, option, 1)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, inter: scalar over a sample's classes, intra: scalar over a class's samples}."""
        tau = value_at(self.temperature, step.progress)
        teacher, student = ((logits / tau).softmax(1) for logits in (step.teacher_logits, step.student_logits))
        return {
            "ce": value_at(self.ce_weight, step.progress) * F.cross_entropy(step.student_logits, step.y),
            "inter": value_at(self.beta, step.progress) * tau**2 * uncorrelated(teacher, student),
            "intra": value_at(self.gamma, step.progress) * tau**2 * uncorrelated(teacher.T, student.T),
        }


def uncorrelated(first: Tensor, second: Tensor) -> Tensor:
    """1 - Pearson's correlation of the rows of two matrices, averaged over the rows: a scalar, 0 to 2."""
    first, second = (one - one.mean(1, keepdim=True) for one in (first, second))
    return 1 - F.cosine_similarity(first, second, dim=1, eps=EPSILON).mean()
