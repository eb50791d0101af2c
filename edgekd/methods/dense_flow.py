"""Dense flow between layers, matched in distance and against discriminators.

After Yeo, Kim, Bae, "Adversarial Optimization-Based Knowledge Transfer of Layer-Wise Dense Flow for Image
Classification", Applied Sciences 11(8):3720, 2021, of which the abstract was read: cross-entropy, an adversarial loss
and a Euclidean loss on dense flows. The formulas and all numbers are a reconstruction [R]. G_ij is the flow between two
taps at most `reach` apart, D_ij a discriminator of its own on its values:

    D_ij maximises   E log D(G_T) + E log(1 - D(G_S))
    the student:     L = ce_weight CE + euclidean_weight sum_ij mean ( G_ij,T - G_ij,S )^2
                         - adversarial_weight sum_ij E log D(G_ij,S)

The square is averaged over the matrix. All terms go together from the start; the authors' earlier work trains from the
bottom up (Bae et al., TIP 2020, abstract), which `staged` can do, by taps. A discriminator is an MLP of 256 and 128
units with leaky ReLUs (slope 0.2), moved by its own Adam (2e-4, beta_1 0.5) in every step, on flows that carry no
gradient to the student; the student meets discriminators that get none from it. Their accuracy, 1/2 where they cannot
tell the flows apart, is in the training log.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.methods import Setting, Step
from edgekd.methods.discriminator import discriminator, judged, moved_by_adam
from edgekd.methods.flow import FlowMethod
from edgekd.methods.options import above_zero, at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at

HIDDEN = (256, 128)


@register("method", "dense_flow")
class DenseFlow(FlowMethod):
    """Flows between neighbouring layers match the teacher's, and discriminators cannot tell them apart.

    euclidean_weight, adversarial_weight: of the two terms. ce_weight: weight of the cross-entropy.
    reach: flows run between taps at most so many apart.
    student_taps, teacher_taps: module paths, in pairs; null is the ends of all stages of edgekd's own networks.
    """

    def __init__(
        self,
        *,
        euclidean_weight: float | Schedule = 1.0,
        adversarial_weight: float | Schedule = 0.05,
        ce_weight: float | Schedule = 1.0,
        reach: int = 2,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.euclidean_weight, self.adversarial_weight = euclidean_weight, adversarial_weight
        self.ce_weight, self.reach = ce_weight, reach
        above_zero("reach", reach, 2)
        at_least_zero("euclidean_weight", euclidean_weight, 1)
        at_least_zero("adversarial_weight", adversarial_weight, 0.05)
        at_least_zero("ce_weight", ce_weight, 1)
        self.discriminators = nn.ModuleList()

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Make adapters, and a discriminator for every flow."""
        super().attach(student, teacher, setting)
        channels = [size[0] for size in self.teacher_sizes]
        self.discriminators.extend(
            discriminator(channels[i] * channels[j], HIDDEN, 1) for i, j in self.between(self.reach)
        )

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The discriminators' own."""
        return [moved_by_adam(self.discriminators)]

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, euclidean, adversarial: scalars, discriminators: scalar, for them alone}."""
        distances, fooled, told, right = [], [], [], []
        for judge, (student, teacher) in zip(
            self.discriminators, self.flows(self.pairs(step), self.reach), strict=True
        ):
            distances.append(F.mse_loss(student, teacher))
            own, real = student.flatten(1), teacher.flatten(1)
            fooled.append(F.softplus(-judged(judge, own)).mean())  # -log D(G_S)
            for_own, for_real = judge(own.detach()), judge(real)
            told.append(F.softplus(for_own).mean() + F.softplus(-for_real).mean())
            right.append(torch.cat((for_own < 0, for_real > 0)).float().mean())
        step.record("discriminator_accuracy", torch.stack(right).mean())
        return {
            "ce": value_at(self.ce_weight, step.progress) * F.cross_entropy(step.student_logits, step.y),
            "euclidean": value_at(self.euclidean_weight, step.progress) * torch.stack(distances).sum(),
            "adversarial": value_at(self.adversarial_weight, step.progress) * torch.stack(fooled).sum(),
            "discriminators": torch.stack(told).sum(),
        }
