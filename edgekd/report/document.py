"""The type of report.json: what a run found, with units in the names and ratios from 0 to 1.

What a run did not find is an `Absent`, which says why; the pages print that sentence in its place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from edgekd.errors import StoreError
from edgekd.report.answers import ClassScores, Estimates
from edgekd.report.engines import Claim, CompiledEngine
from edgekd.report.measuring import EndToEnd, Loadgen, Mode
from edgekd.report.networks import Angles, Spread, SpreadRun
from edgekd.report.part import AGREE, Absent, AccuracyChange, Count, Metric, Part, Positive, Ratio, Span
from edgekd.report.quantization import Quantization
from edgekd.report.robustness import Robustness

SCHEMA_VERSION: Literal[1] = 1
MAX_SAMPLES = 2000

# In the order in which a model passes them: it is the exported ONNX model that is quantized.
Rung = Literal["teacher", "scratch", "student", "onnx", "quantized", "engine", "device"]
RUNGS: tuple[Rung, ...] = get_args(Rung)
Network = Literal["teacher", "scratch", "student", "finetune"]
NETWORKS: tuple[Network, ...] = get_args(Network)
NOT_RECORDED = Absent(reason="This run did not record it.")


class Budget(Part):
    """A limit of the recipe and the value measured against it, both None where nothing measured it yet.

    `bound` says on which side of the limit is good.
    """

    name: str
    limit: float
    value: float | None
    met: bool | None
    bound: Literal["at most", "at least"] = "at most"

    @model_validator(mode="after")
    def _judged_when_measured(self) -> Self:
        if (self.value is None) != (self.met is None):
            raise ValueError(f"budget {self.name}: value and met go together")
        return self


class Speedup(Part):
    """How much faster the student is than the teacher, by what it is a ratio `of`, with its 95% interval.

    `by_launch`: the ratio of every launch of fresh processes, in time order.
    """

    value: Positive
    ci95: Span
    of: str = "median latency"
    by_launch: list[Positive] = Field([])


class Verdict(Part):
    """Whether the measurement holds, why not, and what it says.

    NOT_MEASURED: no device was asked yet, and accuracy is that of the last model made here.
    """

    status: Literal["VALID", "INVALID", "NOT_MEASURED"]
    reasons: list[str] = Field([])
    budgets: list[Budget] = Field([])
    speedup: Speedup | Absent = NOT_RECORDED
    accuracy_change: AccuracyChange | Absent = NOT_RECORDED

    @model_validator(mode="after")
    def _not_valid_says_why(self) -> Self:
        if self.status != "VALID" and not self.reasons:
            raise ValueError(f"a verdict that is {self.status} needs at least one reason")
        return self

    @property
    def status_text(self) -> str:
        """The status as the reader sees it."""
        return self.status.replace("_", " ")


class LadderRow(Part):
    """The score at one step from the teacher to the device; either `score` with `n` and `ci95`, or a `reason`.

    `also`: other measures that the task has, by label.
    """

    rung: Rung
    score: float | None = None
    n: Count | None = None
    ci95: Span | None = None
    agreement_with_teacher: Ratio | None = None
    also: dict[str, Ratio] = Field({})
    size_bytes: Count | None = None
    params: Count | None = None
    macs: Count | None = None
    reason: str | None = None

    @model_validator(mode="after")
    def _measured_or_explained(self) -> Self:
        measured = [self.score is not None, self.n is not None, self.ci95 is not None]
        if any(measured) != all(measured):
            raise ValueError(f"rung {self.rung}: score, n and ci95 go together")
        if all(measured) == bool(self.reason):
            raise ValueError(f"rung {self.rung}: give either score, n and ci95, or a reason")
        return self


class Attacked(Part):
    """Accuracy of one network on the test images as they are and under attack, and under one it must fall to."""

    network: Network
    top1: Ratio
    robust_top1: Ratio
    robust_ci95: tuple[Ratio, Ratio]
    sanity_top1: Ratio
    n: Count


class Attack(Part):
    """Projected gradient descent, each network attacked by its own gradient; epsilon and step size in 1/255."""

    epsilon: Positive
    step_size: Positive
    steps: Count
    sanity_epsilon: Positive
    networks: list[Attacked] = Field(min_length=1)
    warnings: list[str] = Field([])


class Energy(Part):
    """What one inference took from a rail of the board, the median of the launches; `sensor` is what read it."""

    rail: str
    sensor: str
    per_inference_mj: float = Field(ge=0)
    launches: Count


class Latency(Part):
    """One model's latencies on the target, in the fields of `edgekd.bench.summary`; a query has some samples.

    The early-stopping percentiles are MLPerf's estimates that hold with 99% confidence, None with too few queries.
    The samples are in time order; more than `MAX_SAMPLES` are thinned evenly.
    """

    p50_ms: Positive
    p90_ms: Positive
    p99_ms: Positive
    p90_early_stopping_ms: float | None = None
    p99_early_stopping_ms: float | None = None
    mean_ms: Positive
    std_ms: float = Field(ge=0)
    n: int = Field(gt=0)
    samples_per_query: int = Field(1, gt=0)
    warmup_n: Count
    throughput_per_s: Positive
    import_ms: float | None = None
    load_ms: float | None = None
    peak_rss_bytes: Count | None = None
    samples_file: str | None = None
    energy: list[Energy] = Field([])
    samples_ms: list[Positive] = Field([])
    samples_time_s: list[float] = Field([])

    @model_validator(mode="before")
    @classmethod
    def _thin_samples(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        series = ("samples_ms", "samples_time_s")
        return fields | {name: _thinned(fields[name]) for name in series if name in fields}

    @model_validator(mode="after")
    def _one_time_per_sample(self) -> Self:
        if len(self.samples_ms) != len(self.samples_time_s):
            raise ValueError("samples_ms and samples_time_s differ in length")
        return self


class Latencies(Part):
    """Student and teacher on the same device, interleaved in one session."""

    student: Latency | Absent = NOT_RECORDED
    teacher: Latency | Absent = NOT_RECORDED


class Epoch(Part):
    """One pass over the training set; `val_score` on the validation split."""

    epoch: Count
    train_loss: float
    train_score: float | None = None
    val_score: float | None = None
    lr: float
    seconds: float = Field(ge=0)


class Training(Part):
    """How one network was trained."""

    epochs: list[Epoch] = Field(min_length=1)


class Confusion(Part):
    """Counts by [true class][predicted class], K x K, over the test set, on the device where it was measured there."""

    classes: list[str] = Field(min_length=1)
    student: list[list[Count]]
    teacher: list[list[Count]] | Absent = NOT_RECORDED

    @model_validator(mode="after")
    def _square(self) -> Self:
        k = len(self.classes)
        for name in ("student", "teacher"):
            matrix = getattr(self, name)
            if not isinstance(matrix, Absent) and [len(row) for row in matrix] != [k] * k:
                raise ValueError(f"confusion.{name} is not {k} x {k}, one row and column per class")
        return self


class Histogram(Part):
    """Counts of a layer's inputs in equal bins from `low` to `high`, and how many lie outside."""

    low: float
    high: float
    counts: list[Count] = Field(min_length=1)
    below: Count = 0
    above: Count = 0

    @model_validator(mode="after")
    def _low_below_high(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"a histogram from {self.low} to {self.high} has no bins")
        return self


class Activation(Part):
    """The learned activation of one layer: its parameters, its curve (x, y), and the inputs that it meets."""

    name: str
    kind: str
    k: int | None = None
    continuous: bool | None = None
    mu: float | None = None
    sigma: float | None = None
    cuts: list[float] = Field([])
    slopes: list[float] = Field([])
    biases: list[float] = Field([])
    max_jump: float | None = None
    x: list[float] = Field(min_length=2)
    y: list[float] = Field(min_length=2)
    histogram: Histogram | None = None

    @model_validator(mode="after")
    def _one_y_per_x(self) -> Self:
        if len(self.x) != len(self.y):
            raise ValueError(f"activation {self.name}: x and y differ in length")
        return self


class Telemetry(Part):
    """Sensor readings during the benchmark; `series` by name with unit suffix, None where a sensor gave nothing."""

    time_s: list[float]
    series: dict[str, list[float | None]]

    @model_validator(mode="after")
    def _one_reading_per_time(self) -> Self:
        for name, values in self.series.items():
            if len(values) != len(self.time_s):
                raise ValueError(f"telemetry {name}: {len(values)} readings at {len(self.time_s)} times")
        return self


class StageArtifact(Part):
    """What one stage made: its key in the store and the SHA-256 of its manifest."""

    stage: str
    key: str
    sha256: str
    size_bytes: Count
    files: list[str] = Field([])


class Document(Part):
    """All that a report says. The same document always gives the same report, byte for byte."""

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    created: str
    command: str
    recipe: dict[str, Any]
    target: dict[str, Any]
    metric: Metric = Metric()
    agree: str = AGREE
    verdict: Verdict
    ladder: list[LadderRow]
    attack: Attack | Absent = NOT_RECORDED
    angles: list[Angles] | Absent = NOT_RECORDED
    spread: Spread | Absent = NOT_RECORDED
    spread_run: SpreadRun | Absent = NOT_RECORDED
    robustness: Robustness | Absent = NOT_RECORDED
    latency: Latencies = Latencies()
    mode: Mode | Absent = NOT_RECORDED
    end_to_end: EndToEnd | None = None
    loadgen: Loadgen | None = None
    training: dict[Network, Training | Absent] = Field({})
    confusion: Confusion | Absent = NOT_RECORDED
    answers: ClassScores | list[Estimates] | Absent = NOT_RECORDED
    activation: list[Activation] | Absent = NOT_RECORDED
    quantization: Quantization | Absent = NOT_RECORDED
    engines: dict[Literal["student", "teacher"], CompiledEngine] = Field({})
    evidence: list[Claim] = Field([])
    telemetry: Telemetry | Absent = NOT_RECORDED
    environment: dict[str, Any] = Field({})
    artifacts: list[StageArtifact] = Field([])
    notes: list[str] = Field([])

    @model_validator(mode="after")
    def _shares_are_shares(self) -> Self:
        for row in self.ladder:
            if self.metric.share and row.score is not None and not 0 <= row.score <= 1:
                raise ValueError(f"rung {row.rung}: a {self.metric.label} of {row.score} is no share from 0 to 1")
        return self

    @property
    def target_name(self) -> str:
        """The name of the target as the reader knows it."""
        return str(self.target.get("name", "an unnamed target"))

    def row(self, rung: str) -> LadderRow | None:
        """The ladder's row of `rung`, or None when the run has no such rung."""
        return next((row for row in self.ladder if row.rung == rung), None)

    def to_json(self) -> str:
        """The document as JSON text, fields in the order of this class, ending in a newline."""
        content = self.model_dump(mode="json", by_alias=True)
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load(path: Path) -> Document:
    """Read a report.json; raises `StoreError` for a missing or damaged file or one of another schema version."""
    rerun = "make the report again: edgekd report"
    whole = "expected: a report.json as edgekd wrote it"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path}: cannot read the report ({error.strerror})", allowed=whole, fix=rerun) from error
    except ValueError as error:
        what = f"{path}: not a report, the JSON is damaged ({error})"
        raise StoreError(what, allowed=whole, fix=rerun) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{path}: schema_version = {json.dumps(version)} cannot be read",
            allowed=f"this edgekd reads schema_version {SCHEMA_VERSION}",
            fix=f"use the edgekd that wrote it, or {rerun}",
        )
    try:
        return Document.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise StoreError(f"{path}: {where or 'document'}: {first['msg']}", allowed=whole, fix=rerun) from error


def _thinned(values: Any) -> Any:
    """Every so-many-th value such that at most `MAX_SAMPLES` remain: keeps the time order and the distribution."""
    if not isinstance(values, list | tuple) or len(values) <= MAX_SAMPLES:
        return values
    return [values[i * len(values) // MAX_SAMPLES] for i in range(MAX_SAMPLES)]
