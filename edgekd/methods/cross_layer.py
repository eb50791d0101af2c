"""Cross-layer flow, then distillation from an ensemble.

After Chou, Chiu, Liao, APSIPA Transactions on Signal and Information Processing 10:e18, 2021, of which the abstract was
read: a cross-layer (Gram) matrix, two stages with 1x1 convolutions against unlike dimensions, an ensemble of teachers
trained before (here the network `ensemble`) and KL divergence. The formulas are a reconstruction [R]. G_ij is the flow
between taps i and j:

    stage 1, the share `first` of the training:   L = gram_weight sum over i < j of mean ( G_ij,T - G_ij,S )^2
    stage 2:  L = ce_weight CE + kd_weight tau^2 KL( mean over teachers of softmax(z_t / tau) || softmax(z / tau) )

The square is averaged over the matrix, so that its weight does not depend on the number of channels. Of an ensemble the
flows are the first member's. The abstract's mutual learning is not part of it: teachers stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.methods import Setting, Step
from edgekd.methods.flow import FlowMethod
from edgekd.methods.options import a_share, above_zero, at_least_zero
from edgekd.methods.taps import Taps
from edgekd.networks import member_paths
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at


@register("method", "cross_layer")
class CrossLayer(FlowMethod):
    """First the flows between all layers are matched, then the outputs of the teacher, or of all of an ensemble.

    first: share of the training for the flows alone. gram_weight: of their term. kd_weight, ce_weight, temperature: of
    the rest.
    student_taps, teacher_taps: module paths, in pairs; null is the ends of all stages of edgekd's own networks.
    """

    uses_all_parameters = False  # each stage trains other parts

    def __init__(
        self,
        *,
        first: float = 0.25,
        gram_weight: float | Schedule = 1.0,
        kd_weight: float | Schedule = 0.7,
        ce_weight: float | Schedule = 0.3,
        temperature: float | Schedule = 4.0,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.first, self.gram_weight, self.kd_weight, self.ce_weight = first, gram_weight, kd_weight, ce_weight
        self.temperature = temperature
        above_zero("temperature", temperature, 4)
        for name, option in (("gram_weight", gram_weight), ("kd_weight", kd_weight), ("ce_weight", ce_weight)):
            at_least_zero(name, option, 1)
        a_share("first", first, 0.25)
        self._members: list[str] = []

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Make the adapters, and tap what the members of an ensemble answer."""
        super().attach(student, teacher, setting)
        assert teacher is not None
        self._members = member_paths(teacher)
        self.teacher_taps = self.teacher_taps | Taps(teacher, self._members, "teacher")

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{gram: scalar} in the first stage, {ce: scalar, kd: scalar} in the second."""
        if step.progress < self.first:
            flows = self.flows(self.pairs(step), reach=len(self.student_sizes))
            squares = [F.mse_loss(student, teacher) for student, teacher in flows]
            return {"gram": value_at(self.gram_weight, step.progress) * sum(squares, step.x.new_zeros(()))}
        tau = value_at(self.temperature, step.progress)
        output = F.log_softmax(step.student_logits / tau, dim=1)
        kl = F.kl_div(output, self.ensemble(step, tau), reduction="batchmean")
        return {
            "ce": value_at(self.ce_weight, step.progress) * F.cross_entropy(step.student_logits, step.y),
            "kd": value_at(self.kd_weight, step.progress) * tau**2 * kl,
        }

    @torch.no_grad()
    def ensemble(self, step: Step, temperature: float) -> Tensor:
        """[B, K]: the mean of all teachers' softened probabilities."""
        logits = [step.teacher_features[path] for path in self._members] or [step.teacher_logits]
        return torch.stack([(one / temperature).softmax(1) for one in logits]).mean(0)
