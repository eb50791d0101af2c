"""Methods that compare features: the student's taps paired with the teacher's, and the adapters between them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import RecipeError
from edgekd.methods import Method, Setting, Step
from edgekd.methods.taps import Place, Taps, default_taps


class FeatureMethod(Method):
    """A method that taps student and teacher, pair by pair.

    student_taps, teacher_taps: module paths, as many here as there; null is a choice for edgekd's own networks, of
    which the deepest are paired when one has fewer. After `attach`, `student_sizes` and `teacher_sizes` are the shapes
    of the paired features without the batch.
    """

    place: ClassVar[Place] = "maps"

    def __init__(self, student_taps: list[str] | None, teacher_taps: list[str] | None) -> None:
        super().__init__()
        self._given = student_taps, teacher_taps
        self._pairs: list[tuple[str, str]] = []
        self.student_sizes: list[torch.Size] = []
        self.teacher_sizes: list[torch.Size] = []

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Place the taps, and look at what they give for an example. Raises RecipeError when that is impossible."""
        assert teacher is not None
        of_student, of_teacher = self._paths(student, teacher)
        self.student_taps, self.teacher_taps = (
            Taps(student, of_student, "student"),
            Taps(teacher, of_teacher, "teacher"),
        )
        self._pairs = list(zip(of_student, of_teacher, strict=True))
        seen = self.student_taps.probe(student, setting.example), self.teacher_taps.probe(teacher, setting.example)
        self.student_sizes = [self._size(seen[0][path], path, "student") for path in of_student]
        self.teacher_sizes = [self._size(seen[1][path], path, "teacher") for path in of_teacher]

    def pairs(self, step: Step) -> list[tuple[Tensor, Tensor]]:
        """The features of this batch, the student's with gradient: maps [B, C, H, W], or embeddings [B, D]."""
        students, teachers = step.student_features, step.teacher_features
        return [(self._shaped(students[own]), self._shaped(teachers[other])) for own, other in self._pairs]

    def _paths(self, student: nn.Module, teacher: nn.Module) -> tuple[list[str], list[str]]:
        given = self._given
        of_student = given[0] if given[0] is not None else default_taps(student, self.place, "student")
        of_teacher = given[1] if given[1] is not None else default_taps(teacher, self.place, "teacher")
        if given == (None, None):
            count = min(len(of_student), len(of_teacher))
            return of_student[-count:], of_teacher[-count:]
        if not of_student or len(of_student) != len(of_teacher):
            raise RecipeError(
                f"{len(of_student)} student_taps cannot be paired with {len(of_teacher)} teacher_taps",
                allowed=f"student: {', '.join(of_student) or 'none'}; teacher: {', '.join(of_teacher) or 'none'}",
                fix="name as many of the one as of the other, in the order of their pairs",
                key="distill.student_taps" if given[0] is not None else "distill.teacher_taps",
            )
        return of_student, of_teacher

    def _shaped(self, feature: Tensor) -> Tensor:
        return pooled(feature) if self.place == "embedding" else feature

    def _size(self, feature: Tensor, path: str, owner: str) -> torch.Size:
        if self.place == "maps" and feature.ndim != 4:
            raise RecipeError(
                f'distill.{owner}_taps: "{path}" gives {list(feature.shape)} for {len(feature)} images',
                allowed="expected: a feature map [B, C, H, W]",
                fix="tap a convolutional part of the network"
                if feature.ndim < 4
                else "set distill.method = kd for volumes",
                key=f"distill.{owner}_taps",
            )
        return self._shaped(feature).shape[1:]


def pooled(feature: Tensor) -> Tensor:
    """[B, D] of a feature: the mean over a map's sites; anything else is laid flat."""
    return feature.mean((2, 3)) if feature.ndim == 4 else feature.flatten(1)


def same_size(feature: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, C, H, W] brought to the smaller height and width by averaging."""
    size = min(feature.shape[2], other.shape[2]), min(feature.shape[3], other.shape[3])
    first, second = (one if one.shape[2:] == size else F.adaptive_avg_pool2d(one, size) for one in (feature, other))
    return first, second


def adapter(inputs: torch.Size, outputs: torch.Size) -> nn.Module:
    """A learned linear map between the channels of two features: 1x1 convolution and BN, or a linear layer."""
    if len(inputs) == 1:
        return nn.Linear(inputs[0], outputs[0])
    convolution = nn.Conv2d(inputs[0], outputs[0], 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="linear")
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs[0]))
