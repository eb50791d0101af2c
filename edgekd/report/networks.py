"""The parts of the document on what is inside the networks: angles between classes, boards that may be silent."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgekd.report.part import Count, Part, Positive


class Angles(Part):
    """Between the class vectors of one network's classifier; `closest` are the names of the two classes."""

    network: str
    smallest_deg: float = Field(ge=0, le=180)
    mean_deg: float = Field(ge=0, le=180)
    largest_deg: float = Field(ge=0, le=180)
    closest: tuple[str, str]


class Silence(Part):
    """The score with so many silent boards: over the `tried` of all `ways` in which that can be."""

    silent: Count
    tried: Count
    ways: Count
    score: float
    lowest_score: float
    highest_score: float


class BoardPart(Part):
    """What one board gets."""

    file: str
    size_bytes: Count
    params: Count
    macs: Count


class Spread(Part):
    """A student on several boards: each feature is given by `copies` of them, in one message per image."""

    boards: Count
    copies: Count
    message_bytes: Count
    parts: list[BoardPart] = Field(min_length=2)
    silent: list[Silence] = Field(min_length=2)


class BoardAnswered(Part):
    """How one board did; SILENT is one that failed or was lost, with the reason, and no latency."""

    name: str
    url: str
    target: str
    backend: str
    status: Literal["VALID", "INVALID", "SILENT"]
    reasons: list[str]
    size_bytes: Count
    p50_ms: Positive | None
    p99_ms: Positive | None


class SpreadRun(Part):
    """A spread student run on its boards; `silent` begins with those that were."""

    boards: list[BoardAnswered] = Field(min_length=2)
    n: Count
    silent: list[Silence] = Field(min_length=1)
