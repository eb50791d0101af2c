"""FitNets: hints from the middle of the teacher.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015, eq. 3: a regressor r on
the student's guided layer u predicts the teacher's hint layer v,

    L = ce_weight CE + weight / 2 mean || v(x) - r(u(x)) ||^2

Where ours differs: the paper trains the hint first and distils afterwards (`staged` does that: `methods: [{fitnet:
{ce_weight: 0}}, kd]`), here both terms may also go together; the square is averaged over the map's values, which makes
the weight independent of their number; the regressor is a 1x1 convolution with batch normalisation, and where the maps
differ in height and width the larger one is averaged down, where the paper chooses the kernel to fit.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.methods import Setting, Step
from edgekd.methods.features import FeatureMethod, adapter, same_size
from edgekd.methods.options import at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at


@register("method", "fitnet")
class FitNet(FeatureMethod):
    """The student's feature maps, through learned adapters, match the teacher's in mean square.

    weight: of the hints' term, the mean over the pairs of taps. ce_weight: weight of the cross-entropy.
    student_taps, teacher_taps: module paths, in pairs; null is the ends of all stages of edgekd's own networks.
    """

    tasks = None

    def __init__(
        self,
        *,
        weight: float | Schedule = 1.0,
        ce_weight: float | Schedule = 1.0,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.weight, self.ce_weight = weight, ce_weight
        at_least_zero("weight", weight, 1)
        at_least_zero("ce_weight", ce_weight, 1)
        self.adapters = nn.ModuleList()

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Make the regressors."""
        super().attach(student, teacher, setting)
        sizes = zip(self.student_sizes, self.teacher_sizes, strict=True)
        self.adapters.extend(adapter(inputs, outputs) for inputs, outputs in sizes)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, hint: scalar}."""
        hints = [
            F.mse_loss(*same_size(regressor(student).float(), teacher))
            for regressor, (student, teacher) in zip(self.adapters, self.pairs(step), strict=True)
        ]
        return {
            "ce": value_at(self.ce_weight, step.progress) * step.label_loss(),
            "hint": value_at(self.weight, step.progress) / 2 * sum(hints, step.x.new_zeros(())) / len(hints),
        }
