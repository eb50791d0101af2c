"""Distillation of real values: the student estimates what the teacher estimates.

A. Greco, A. Saggese, M. Vento, V. Vigilante, "Effective training of convolutional neural networks for age estimation
based on knowledge distillation", Neural Computing and Applications 2021: the teacher labels the images, and the student
learns these values alone,

    L = teacher_weight * MSE(clip(student), teacher) + label_weight * MSE(clip(student), y)

with clip the range of the values, 0 to 100 years there (`data.task: {regression: {low: 0, high: 100}}`). There the
teacher's labels are made once and the images have no others: label_weight is 0. Labels of one's own beside it are an
addition. Errors are in units of the values' spread, not in years: that changes the learning rate, and nothing else.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from edgekd.errors import RecipeError, shown
from edgekd.methods import Method, Step
from edgekd.methods.options import at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at, values_of
from edgekd.tasks.regression import Regression as RegressionTask


@register("method", "regression")
class Regression(Method):
    """The student estimates the teacher's values, and the labels.

    teacher_weight, label_weight: of the mean squared errors against either. The defaults are the paper's: the labels
    are not looked at.
    """

    tasks = ("regression",)

    def __init__(self, *, teacher_weight: float | Schedule = 1.0, label_weight: float | Schedule = 0.0) -> None:
        super().__init__()
        self.teacher_weight, self.label_weight = teacher_weight, label_weight
        at_least_zero("teacher_weight", teacher_weight, 1)
        at_least_zero("label_weight", label_weight, 0)
        if max(values_of(teacher_weight)) == max(values_of(label_weight)) == 0:
            raise RecipeError(
                f"distill.teacher_weight = {shown(teacher_weight)} and distill.label_weight = {shown(label_weight)}: "
                "nothing is left to learn",
                allowed="expected: one of them above 0",
                fix="--set distill.teacher_weight=1",
                key="distill.teacher_weight",
            )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{teacher: scalar, task: scalar}."""
        assert isinstance(step.task, RegressionTask)
        values = step.task.cut(step.student_logits)
        return {
            "teacher": value_at(self.teacher_weight, step.progress) * F.mse_loss(values, step.teacher_logits),
            "task": value_at(self.label_weight, step.progress) * step.label_loss(),
        }
