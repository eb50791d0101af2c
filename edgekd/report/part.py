"""What every part of the document is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from edgekd.report.formatting import number, percent, points, signed
from edgekd.tasks import ROUNDING

Ratio = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Span = tuple[float, float]
# What agreement is where a run says nothing else.
AGREE = "share of samples for which both name the same class"


class Part(BaseModel):
    """A frozen piece of the document that refuses unknown fields, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Absent(Part):
    """In place of something that this run did not find: the reason, as a sentence for the reader."""

    reason: str = Field(min_length=1)


class AccuracyChange(Part):
    """The score of one model minus that of another on the same samples, with 95% interval; `test` gave the p-value."""

    value: float
    ci95: Span
    p_value: Ratio
    test: str = "McNemar"


def _rounded(difference: float) -> float:
    return difference if abs(difference) >= ROUNDING else 0.0


class Metric(Part):
    """What every `score` of the document is; as `edgekd.tasks.Metric`. Top-1 where a run says nothing else."""

    name: str = "top1"
    label: str = "Top-1"
    higher_is_better: bool = True
    share: bool = True
    unit: str = ""

    @property
    def title(self) -> str:
        """The label with its unit, as a column is headed: `Top-1`; `MAE, years`."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def noun(self) -> str:
        """What a sentence calls it."""
        return "accuracy" if self.name == "top1" else self.label

    @property
    def of_class(self) -> str:
        """What it is called for a single class."""
        return "recall" if self.name == "top1" else self.label

    def text(self, score: float) -> str:
        """91.52%, or 1.21 without its unit."""
        return percent(score) if self.share else number(score)

    def change(self, difference: float) -> str:
        """−0.40 points, or +0.12 years."""
        return points(difference) if self.share else f"{self.bare(difference)} {self.unit}".strip()

    def bare(self, difference: float) -> str:
        """The same without points or unit."""
        if self.share:
            return points(difference).removesuffix(" points")
        return signed(_rounded(difference))

    def loss(self, value: float) -> str:
        """Of a budget: 5.00 points, or 1.00 years."""
        return points(value).lstrip("+") if self.share else f"{number(_rounded(value))} {self.unit}".strip()

    def span(self, ends: Span) -> str:
        """91.10 to 91.90%."""
        low, high = (self.text(end) for end in ends)
        return f"{low.removesuffix('%')} to {high}"
