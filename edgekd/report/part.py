"""What every part of the document is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Span = tuple[float, float]


class Part(BaseModel):
    """A frozen piece of the document that refuses unknown fields, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Absent(Part):
    """In place of something that this run did not find: the reason, as a sentence for the reader."""

    reason: str = Field(min_length=1)


class AccuracyChange(Part):
    """Top-1 of one model minus that of another on the same samples, with 95% interval and McNemar's p-value."""

    value: float = Field(ge=-1, le=1)
    ci95: Span
    p_value: Ratio
