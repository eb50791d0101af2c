"""Inter-class angular loss.

Hui, Li, Chen, Ding, Wang, "Inter-Class Angular Loss for Convolutional Neural Networks" (ICAL), AAAI 2019, and its code.
With w_c the K rows of the classifier,

    L = ce_weight CE + weight / K^2 || sum_c w_c / ||w_c|| ||^2  =  ... + weight * mean over all i, j of cos(w_i, w_j)

which is smallest where the unit vectors sum to 0: a simplex, whose angles are acos(-1 / (K - 1)). The gradient of this
term reaches the classifier's weights only. The paper's last layer has no bias and unit vectors, which its code makes of
the stored ones in every step: `length` 1. A larger one lets the logits of many classes differ more [R]. Ours leaves the
layer as it is by default and adds the term alone, so it combines with any method (`combined`). The published weight is
5 with augmentation and 10 without on CIFAR-10, where the code's default is 0.1.

The smallest, mean and largest angle between two classes, in degrees, are in the training log; those of teacher, student
without a teacher and student in the report.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import RecipeError, unknown
from edgekd.methods import Method, Setting, Step
from edgekd.methods.options import above_zero, at_least_zero
from edgekd.networks.classifier import angles_between, classifiers
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at


@register("method", "angular")
class Angular(Method):
    """The classifier's class vectors are spread apart; needs no teacher, and adds to any method.

    weight: of the angular term. ce_weight: weight of the cross-entropy.
    length: of the class vectors after every update, which then have no bias; null leaves both as they are.
    classifier: path of the linear layer that gives the logits; null is the last one with a row for each class.
    """

    needs_teacher = False
    needs_modules = True

    def __init__(
        self,
        *,
        weight: float | Schedule = 5.0,
        ce_weight: float | Schedule = 1.0,
        length: float | Schedule | None = None,
        classifier: str | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.ce_weight, self.length, self.classifier = weight, ce_weight, length, classifier
        above_zero("length", 1 if length is None else length, 1)
        at_least_zero("weight", weight, 5)
        at_least_zero("ce_weight", ce_weight, 1)
        self._path = ""
        self._layer: tuple[nn.Linear | nn.Conv2d, ...] = ()  # in a tuple: it stays the student's

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Find the classifier. Raises RecipeError when the student has none of that name, or none at all."""
        linear = classifiers(student, setting.num_classes)
        if self.classifier is not None and self.classifier not in linear:
            noun = f"layer of the student with {setting.num_classes} outputs"
            raise unknown("distill.classifier", self.classifier, linear, noun=noun, fix="leave it out")
        if not linear:
            raise RecipeError(
                f"the student has no linear layer with {setting.num_classes} outputs",
                allowed="expected: a network whose logits a linear layer gives: its rows are the classes' vectors",
                fix="use another method, or another student",
                key="distill.method",
            )
        self._path = self.classifier or list(linear)[-1]
        self._layer = (linear[self._path],)

    def constrain(self, student: nn.Module, *, step_size: float, progress: float) -> None:
        """Bring the class vectors to their length, and the bias to 0, if that is wanted."""
        if self.length is None:
            return
        weight, layer = student.get_parameter(f"{self._path}.weight"), student.get_submodule(self._path)
        with torch.no_grad():
            weight.copy_(value_at(self.length, progress) * F.normalize(weight.flatten(1)).view_as(weight))
            if isinstance(layer.bias, nn.Parameter):
                layer.bias.zero_()

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, angular: scalar}."""
        (layer,) = self._layer
        vectors = F.normalize(layer.weight.flatten(1).float())
        angles = angles_between(layer.weight)
        for name, value in (("min", angles.amin()), ("mean", angles.mean()), ("max", angles.amax())):
            step.record(f"angle_{name}", value)
        return {
            "ce": value_at(self.ce_weight, step.progress) * F.cross_entropy(step.student_logits, step.y),
            "angular": value_at(self.weight, step.progress) * (vectors.sum(0) / len(vectors)).square().sum(),
        }
