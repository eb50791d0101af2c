"""The flow between two layers: which channels of the one are active together with which channels of the other."""

from __future__ import annotations

from torch import Tensor, nn

from edgekd.errors import RecipeError
from edgekd.methods import Setting
from edgekd.methods.features import FeatureMethod, adapter, same_size


def flow(first: Tensor, second: Tensor) -> Tensor:
    """The Gram, or FSP, matrix [B, C, C'] of two maps [B, C, H, W], [B, C', H', W'], the larger averaged down:

    G[m, n] = mean over the sites s of first[m, s] * second[n, s]   (Yim, Joo, Bae, Kim, CVPR 2017, eq. 1)
    """
    first, second = (one.flatten(2) for one in same_size(first, second))
    return first @ second.transpose(1, 2) / first.shape[2]


class FlowMethod(FeatureMethod):
    """A method that compares flows between taps; adapters give the student's maps the teacher's channels."""

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Make an adapter for every tap whose channels differ."""
        super().attach(student, teacher, setting)
        if len(self.student_sizes) < 2:
            raise RecipeError(
                f"a flow runs between two layers, and {len(self.student_sizes)} is tapped",
                allowed="expected: two module paths or more",
                fix="name more in distill.student_taps and distill.teacher_taps",
                key="distill.student_taps",
            )
        self.adapters = nn.ModuleList(
            nn.Identity() if inputs[0] == outputs[0] else adapter(inputs, outputs)
            for inputs, outputs in zip(self.student_sizes, self.teacher_sizes, strict=True)
        )

    def flows(self, pairs: list[tuple[Tensor, Tensor]], reach: int) -> list[tuple[Tensor, Tensor]]:
        """The flows of student and teacher between any two taps, i < j, that are at most `reach` apart."""
        students = [adapt(one).float() for adapt, (one, _) in zip(self.adapters, pairs, strict=True)]
        teachers = [one for _, one in pairs]
        return [(flow(students[i], students[j]), flow(teachers[i], teachers[j])) for i, j in self.between(reach)]

    def between(self, reach: int) -> list[tuple[int, int]]:
        """The pairs of taps that have a flow."""
        return [(i, j) for j in range(len(self.student_sizes)) for i in range(max(0, j - reach), j)]
