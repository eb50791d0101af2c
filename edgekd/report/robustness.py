"""The part of report.json about corrupted images."""

from __future__ import annotations

from pydantic import Field

from edgekd.report.part import Count, Part


class Corrupted(Part):
    """Scores of the networks under one corruption."""

    kind: str
    category: str
    severity: int = Field(ge=1, le=5)
    teacher: float | None = None
    student: float


class Robustness(Part):
    """Scores of the exported networks on the first `n` test images as they are, and corrupted."""

    n: Count
    clean: dict[str, float]
    rows: list[Corrupted] = Field(min_length=1)
