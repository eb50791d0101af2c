"""Knowledge distillation from the teacher's softened outputs.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, in the form of the LMA paper
(Xu et al., AAAI 2020, eq. 1):

    L = ce_weight * CE(student, y) + kd_weight * tau^2 * KL(softmax(teacher / tau) || softmax(student / tau))

Codebases differ in three places, so all three are options: which term `alpha` weighs (here each has its own weight),
whether tau^2 is there, and whether KL is summed over the classes (`batchmean`) or averaged over them too (`mean`).

With schedules it is also the annealed distillation of a sensor's successor (Van Molle et al., Sensors 21(19), 2021:
`kd_weight: {linear: [1, 0]}`) and the falling temperature of KDAS-ReID (Lei et al., Algorithms 14(5), 2021:
`temperature: {linear: [8, 1]}`). Both papers' abstracts tell the idea; their schedules are not known here [R].
Selective distillation is Van Molle's second finding, and its two rules are a reconstruction [R] too: the samples that
the teacher does not get right, or is not sure of, have no KL and their cross-entropy at full weight. Where labels are
few, the teacher can also answer for images that have none, which is our own addition to the sum [R]:

    unlabelled_weight * tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)) of a batch of those

In segmentation every pixel has a KL, and their mean is taken; the loss on the labels is the task's, which has a Dice
beside the cross-entropy, and so the teacher has one beside KL: kd_weight * (1 - soft Dice of both networks).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import RecipeError, shown
from edgekd.methods import Method, Setting, Step
from edgekd.methods.divergence import divergences, from_teacher, softening
from edgekd.methods.options import above_zero, at_least_zero, from_zero_to_one
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at, values_of


@register("method", "kd")
class KD(Method):
    """The student matches the teacher's softened class probabilities, and the labels.

    kd_weight: weight of the KL term. ce_weight: weight of the cross-entropy; null is 1 - kd_weight.
    temperature: tau, softens both outputs; higher shows more of how the teacher ranks the wrong classes. null is the
    task's: 4 for classes, 1 for every pixel.
    tau_squared: multiply KL by tau^2, which keeps its gradient at the scale of the cross-entropy's.
    kl_reduction: `batchmean` sums KL over the classes, `mean` averages over them as well.
    selective: distil only where the teacher is `right`, or `sure` of the label; elsewhere labels alone teach.
    confidence: `sure` is a teacher that gives the label a probability above this.
    unlabelled_weight: weight of KL on the images of data.target_domain, whose labels are not used; 0 needs none.
    """

    tasks = ("classification", "segmentation")

    def __init__(
        self,
        *,
        kd_weight: float | Schedule = 0.7,
        ce_weight: float | Schedule | None = None,
        temperature: float | Schedule | None = None,
        tau_squared: bool = True,
        kl_reduction: Literal["batchmean", "mean"] = "batchmean",
        selective: Literal["right", "sure"] | None = None,
        confidence: float | Schedule = 0.5,
        unlabelled_weight: float | Schedule = 0.0,
    ) -> None:
        super().__init__()
        self.kd_weight, self.ce_weight, self.temperature = kd_weight, ce_weight, temperature
        self.tau_squared, self.kl_reduction = tau_squared, kl_reduction
        self.selective, self.confidence = selective, confidence
        if temperature is not None:
            above_zero("temperature", temperature, 4)
        from_zero_to_one("confidence", confidence, 0.5)
        at_least_zero("unlabelled_weight", unlabelled_weight, 1)
        self.unlabelled_weight, self.needs_target = unlabelled_weight, max(values_of(unlabelled_weight)) > 0
        weights = values_of(kd_weight)
        others = [1 - weight for weight in weights] if ce_weight is None else values_of(ce_weight)
        if min(*weights, *others) < 0:
            raise RecipeError(
                f"distill.kd_weight = {shown(kd_weight)} leaves a negative weight",
                allowed="expected: both weights at least 0",
                fix="--set distill.kd_weight=0.7, or give distill.ce_weight",
                key="distill.kd_weight",
            )

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Raises RecipeError for a selection of pixels."""
        if self.selective is not None and setting.task.name != "classification":
            raise RecipeError(
                f"distill.selective = {shown(self.selective)} selects samples, and the task is {setting.task.name}",
                allowed="with it: classification",
                fix="--set distill.selective=null",
                key="distill.selective",
            )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, kd: scalar}; with joint: scalar for pixels, and both again for images without labels."""
        kd_weight = value_at(self.kd_weight, step.progress)
        ce_weight = 1 - kd_weight if self.ce_weight is None else value_at(self.ce_weight, step.progress)
        if self.selective is not None:
            terms = self._selected(step, kd_weight, ce_weight)
        else:
            terms = {"ce": ce_weight * step.label_loss()}
            terms |= self._distilled(step, step.teacher_logits, step.student_logits, kd_weight)
        if self.needs_target:
            answers, student = step.ask_teacher(step.target).detach(), step.student(step.target).float()
            weight = value_at(self.unlabelled_weight, step.progress)
            terms |= self._distilled(step, answers, student, weight, "unlabelled_")
        return terms

    def _distilled(
        self, step: Step, teacher: Tensor, student: Tensor, weight: float, name: str = ""
    ) -> dict[str, Tensor]:
        weights = weight * self._scale(step), weight
        return from_teacher(step, teacher, student, weights, softening(self.temperature, step), name)

    def _selected(self, step: Step, kd_weight: float, ce_weight: float) -> dict[str, Tensor]:
        """The same sum where the teacher is trusted; cross-entropy with both weights elsewhere."""
        if self.selective == "right":
            trusted = (step.teacher_logits.argmax(1) == step.y).float()
        else:
            of_label = step.teacher_logits.softmax(1).gather(1, step.y[:, None])[:, 0]
            trusted = (of_label > value_at(self.confidence, step.progress)).float()
        step.record("trusted", trusted.mean())
        kl = divergences(step.teacher_logits, step.student_logits, softening(self.temperature, step))
        ce = F.cross_entropy(step.student_logits, step.y, reduction="none")
        return {
            "ce": ((ce_weight + kd_weight * (1 - trusted)) * ce).mean(),
            "kd": kd_weight * ((trusted * kl).mean() * self._scale(step)),
        }

    def _scale(self, step: Step) -> float:
        scale = softening(self.temperature, step) ** 2 if self.tau_squared else 1.0
        return scale / step.student_logits.shape[1] if self.kl_reduction == "mean" else scale
