"""No distillation: the baseline that every method has to beat."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from edgekd.methods import Method, Step
from edgekd.methods.options import a_share
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at


@register("method", "scratch")
class Scratch(Method):
    """What the task minimises on the labels alone, without a teacher; for classes, cross-entropy.

    label_smoothing: share of the target spread evenly over the classes (Szegedy et al., CVPR 2016).
    """

    tasks = None
    needs_teacher = False

    def __init__(self, *, label_smoothing: float | Schedule = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        a_share("label_smoothing", label_smoothing, 0.1)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar}; {task: scalar} where there are no classes to name."""
        if step.task.name != "classification":
            return {"task": step.label_loss()}
        smoothing = value_at(self.label_smoothing, step.progress)
        return {"ce": F.cross_entropy(step.student_logits, step.y, label_smoothing=smoothing)}
