"""What the agent writes of a benchmark, its result.json, as `edgekd.agent.conductor` and its workers make it."""

from __future__ import annotations

from pydantic import Field

from edgekd.device.facts import Facts, Now
from edgekd.documents import Count, Document, Text

Scalar = Text | int | float | bool | None


class Reading(Now):
    """What the sensors said after a round, and what happened since the one before. power_mw: by rail."""

    launch: Count
    time_s: float
    seconds: float = Field(gt=0)
    power_mw: dict[Text, float]
    own_cpu_s: float = 0.0
    foreign_cpu_s: float = 0.0
    steal_s: float = 0.0


class WarmUp(Document):
    """Of one kind of turn."""

    queries: Count
    stable: bool
    median_ns: Count
    batched: bool


class Used(Document):
    """The energy by one rail of `samples` in turns of one kind."""

    rail: Text
    sensor: Text
    turn: Count
    mj: float
    samples: int = Field(gt=0)
    seconds: float
    readings: Count


class Launch(Document):
    """What one model's process said. facts: of the engine, by its runner."""

    facts: dict[Text, Scalar | list[Scalar] | dict[Text, Scalar]]
    import_ms: float
    load_ms: float
    rss_before_load_bytes: Count | None
    peak_rss_bytes: Count | None
    warm_up: list[WarmUp] = Field(min_length=1)
    energy: list[Used]
    decoder: Text = ""


class Measured(Document):
    """All of it. models: their launches by name."""

    models: dict[Text, list[Launch]]
    telemetry: list[Reading] = Field(min_length=1)
    device: Facts
    interruptions: Count
