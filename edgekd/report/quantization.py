"""The part of report.json about quantization: what was done, what it cost, and where; `_db` is signal to noise."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from edgekd.report.part import AGREE, Absent, AccuracyChange, Count, Metric, Part, Positive, Ratio, Span


class CalibrationImages(Part):
    """The images that gave the ranges; `sha256` of their pixels, `class_counts` by class."""

    source: str
    n: int = Field(gt=0)
    seed: int
    sha256: str
    class_counts: dict[str, Count]


class RangeTrial(Part):
    """One way of choosing ranges, and what it gave on the validation split."""

    method: str
    percentile: float | None
    score: float
    logits_sqnr_db: float


class Ranges(Part):
    """The way of choosing ranges that was used. When the recipe named it, `tried` is empty and the rest is None.

    `score` and `float_score` are those of the `n` validation samples.
    """

    method: str
    percentile: float | None
    tried: list[RangeTrial]
    n: Count | None = None
    float_score: float | None = None
    score: float | None = None


class QuantizedAccuracy(Part):
    """The score of the float and the quantized model on the same `n` test samples, and the second minus the first."""

    n: int = Field(gt=0)
    float_score: float
    score: float
    float_ci95: Span
    ci95: Span
    change: AccuracyChange | Absent


class QuantizedSize(Part):
    """The model files."""

    float_bytes: int = Field(gt=0)
    bytes: int = Field(gt=0)


class QuantizedLayer(Part):
    """What one layer lost by its own rounding (weights, input), and its output with all that was lost before."""

    layer: str
    quantized: bool
    weights_sqnr_db: float
    weights_cosine: float = Field(ge=-1.001, le=1.001)
    input_sqnr_db: float | None
    input_clipped: Ratio | None
    output_sqnr_db: float
    output_cosine: float = Field(ge=-1.001, le=1.001)
    suggestion: str


class QuantizedLMA(Part):
    """The input of one LMA layer under rounding; `range_low` and `range_high` are mu -+ 3 sigma, `step` one code."""

    layer: str
    max_jump: float
    step: Positive | None
    changed_segment: Ratio
    low: float
    high: float
    range_low: float
    range_high: float
    outside: Ratio


class QuantizedClass(Part):
    """The score of one class before and after, None for a class without test samples."""

    name: str = Field(alias="class")
    n: Count
    float_score: float | None
    score: float | None
    change: float | None

    @model_validator(mode="after")
    def _measured_with_samples(self) -> Self:
        if {value is None for value in (self.float_score, self.score, self.change)} != {self.n == 0}:
            raise ValueError(f"class {self.name}: scores and samples do not go together")
        return self


class SearchTrial(Part):
    """How many layers were in float, and the score on the validation split."""

    keep_float: Count
    score: float


class FloatSearch(Part):
    """The search for layers to keep in float; `sensitivity_db`: SQNR of the logits with this layer alone rounded."""

    keep_float: list[str]
    score: float
    float_score: float
    met: bool
    out_of_time: bool
    tried: list[SearchTrial] = Field(min_length=1)
    sensitivity_db: dict[str, float]


class RuleFinding(Part):
    """A node of the graph that TensorRT rejects, or runs more slowly than meant."""

    node: str
    rule: str
    effect: Literal["rejected", "slow"]
    reason: str
    fix: str


class Agreement(Part):
    """The deployed graph against the model that was trained with rounding; `max_difference` of a logit."""

    n: int = Field(gt=0)
    agreement: Ratio
    max_difference: float = Field(ge=0)


class Quantization(Part):
    """What the stage `quantize` recorded; names are those of layers in the graph."""

    method: str
    precision: str
    metric: Metric = Metric()
    agree: str = AGREE
    options: dict[str, Any]
    calibration: CalibrationImages | None
    calibrate: Ranges | None
    accuracy: QuantizedAccuracy
    size: QuantizedSize
    layers: list[QuantizedLayer]
    lma: list[QuantizedLMA]
    classes: list[QuantizedClass]
    still_float: list[str]
    keep_float: list[str]
    search: FloatSearch | None
    findings: list[RuleFinding]
    agreement: Agreement | None
    warnings: list[str]
    suggestions: list[str]

    @model_validator(mode="after")
    def _every_layer_has_a_row(self) -> Self:
        known = [row.layer for row in self.layers]
        if len(set(known)) < len(known):
            raise ValueError("two rows of quantization.layers have one name")
        for name in self.still_float:
            if name not in known:
                raise ValueError(f"quantization.still_float names {name}, which has no row in quantization.layers")
        return self
