"""The parts of report.json about how the engines were asked, and what only that way of asking finds."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from edgekd.report.part import Count, Part, Positive, Ratio, Span

Model = Literal["student", "teacher"]


class SingleStream(Part):
    """One sample after the other."""

    name: Literal["single_stream"] = "single_stream"


class MultiStream(Part):
    """Queries of several samples; `batched`: whether an engine took them as one batch, or one after the other."""

    name: Literal["multi_stream"]
    samples_per_query: int = Field(gt=1)
    batched: dict[Model, bool]


class Batch(Part):
    """Queries of one batch size; throughput in samples."""

    batch: int = Field(gt=0)
    p50_ms: Positive
    p90_ms: Positive
    throughput_per_s: Positive
    queries: Count


class Offline(Part):
    """A sweep over batch sizes; `best_batch` is that of the highest throughput."""

    name: Literal["offline"]
    sweep: dict[Model, Annotated[list[Batch], Field(min_length=1)]]
    best_batch: dict[Model, int]

    @model_validator(mode="after")
    def _best_was_measured(self) -> Self:
        for model, rows in self.sweep.items():
            if self.best_batch.get(model) not in [row.batch for row in rows]:
                raise ValueError(f"mode.best_batch of the {model} is none of its sweep")
        return self


class Frames(Part):
    """How one model kept up with the clock; `ci95` of the share missed, `busy_share` of a period spent computing."""

    frames: Count
    missed: Count
    missed_share: Ratio
    ci95: Span
    computing_p50_ms: Positive
    waited_p99_ms: float = Field(ge=0)
    busy_share: Positive
    highest_fps: Positive


class Fps(Part):
    """Frames on a clock of so many a second; a frame's deadline is the arrival of the next one."""

    name: Literal["fps"]
    fps: Positive
    models: dict[Model, Frames]


class RatioSpan(Part):
    """A speed-up with its 95% interval."""

    value: Positive
    ci95: Span


class Window(Part):
    """A part of a sustained run; temperature of the hottest zone and clock of the fastest core, None without sensor.

    `speedup`: None without a teacher.
    """

    start_s: float
    end_s: float
    p50_ms: dict[Model, Positive]
    rank: list[Model]
    speedup: RatioSpan | None
    temperature_c: float | None
    clock_hz: Positive | None


class Sustained(Part):
    """Minutes without a pause; `slower`: a model's p50 in the last window against the first, as a share."""

    name: Literal["sustained"]
    windows: list[Window] = Field(min_length=1)
    slower: dict[Model, float]
    throttling: list[str]


class Steps(Part):
    """One model from the stored image to its answer; `steps_ms` are medians by step, in their order."""

    p50_ms: Positive
    p90_ms: Positive
    p99_ms: Positive
    n: Count
    steps_ms: dict[str, float]


class EndToEnd(Part):
    """From the stored image to the answer, in the same session; `decoder`: what decodes on the device.

    `speedup`: None without a teacher.
    """

    decoder: str
    models: dict[Model, Steps]
    speedup: RatioSpan | None


class LoadgenModel(Part):
    """What LoadGen measured of one engine: medians over its turns; `agent_over_loadgen` is the ratio of the p50s."""

    p50_ms: Positive
    p90_ms: Positive
    p99_ms: Positive
    n: Count
    p50_by_turn_ms: list[Positive]
    agent_p50_ms: Positive
    agent_over_loadgen: Positive


class Loadgen(Part):
    """The same engines under MLPerf's load generator, single stream, on the machine that they were measured on."""

    version: str
    models: dict[Model, LoadgenModel]


Mode = Annotated[SingleStream | MultiStream | Offline | Fps | Sustained, Field(discriminator="name")]
