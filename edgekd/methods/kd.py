"""Knowledge distillation from the teacher's softened outputs.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, in the form of the LMA paper
(Xu et al., AAAI 2020, eq. 1):

    L = ce_weight * CE(student, y) + kd_weight * tau^2 * KL(softmax(teacher / tau) || softmax(student / tau))

Codebases differ in three places, so all three are options: which term `alpha` weighs (here each has its own weight),
whether tau^2 is there, and whether KL is summed over the classes (`batchmean`) or averaged over them too (`mean`).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from edgekd.errors import RecipeError
from edgekd.methods import Method, Step
from edgekd.registry import register


@register("method", "kd")
class KD(Method):
    """The student matches the teacher's softened class probabilities, and the labels.

    kd_weight: weight of the KL term. ce_weight: weight of the cross-entropy; null is 1 - kd_weight.
    temperature: tau, softens both outputs; higher shows more of how the teacher ranks the wrong classes.
    tau_squared: multiply KL by tau^2, which keeps its gradient at the scale of the cross-entropy's.
    kl_reduction: `batchmean` sums KL over the classes, `mean` averages over them as well.
    """

    def __init__(
        self,
        *,
        kd_weight: float = 0.7,
        ce_weight: float | None = None,
        temperature: float = 4.0,
        tau_squared: bool = True,
        kl_reduction: Literal["batchmean", "mean"] = "batchmean",
    ) -> None:
        super().__init__()
        self.kd_weight = kd_weight
        self.ce_weight = 1 - kd_weight if ce_weight is None else ce_weight
        self.temperature, self.tau_squared, self.kl_reduction = temperature, tau_squared, kl_reduction
        if temperature <= 0:
            raise RecipeError(
                f"distill.temperature = {temperature} is not valid",
                allowed="expected: above 0",
                fix="--set distill.temperature=4",
                key="distill.temperature",
            )
        if min(self.kd_weight, self.ce_weight) < 0:
            raise RecipeError(
                f"distill.kd_weight = {kd_weight} leaves a negative weight",
                allowed="expected: both weights at least 0",
                fix="--set distill.kd_weight=0.7, or give distill.ce_weight",
                key="distill.kd_weight",
            )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, kd: scalar}."""
        return {
            "ce": self.ce_weight * F.cross_entropy(step.student_logits, step.y),
            "kd": self.kd_weight * self.divergence(step.teacher_logits, step.student_logits),
        }

    def divergence(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """tau^2 KL(teacher || student) of two [B, K] logits, a scalar."""
        target = F.log_softmax(teacher_logits.float() / self.temperature, dim=1)
        output = F.log_softmax(student_logits.float() / self.temperature, dim=1)
        divergence = F.kl_div(output, target, reduction="batchmean", log_target=True)
        if self.kl_reduction == "mean":
            divergence = divergence / output.shape[1]  # by hand: torch announces that its own "mean" will change
        return divergence * self.temperature**2 if self.tau_squared else divergence
