"""The part of report.json about single answers where the task is not classification, which has its confusion matrix."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from edgekd.report.part import Count, Part


class ClassScores(Part):
    """The score of each class on the test samples that have it, None without any; `n` of them; the teacher's if any."""

    names: list[str] = Field(min_length=1)
    n: list[Count]
    student: list[float | None]
    teacher: list[float | None] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        theirs = self.student if self.teacher is None else self.teacher
        if not len(self.names) == len(self.n) == len(self.student) == len(theirs):
            raise ValueError("answers: names, n, student and teacher differ in length")
        return self


class Estimates(Part):
    """True and estimated values of some test samples, by their name, in the metric's unit; the teacher's if any."""

    name: str
    true: list[float] = Field(min_length=1)
    student: list[float]
    teacher: list[float] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        theirs = self.student if self.teacher is None else self.teacher
        if not len(self.true) == len(self.student) == len(theirs):
            raise ValueError("answers: true, student and teacher differ in length")
        return self
