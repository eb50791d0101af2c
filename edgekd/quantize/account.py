"""Where accuracy went: layer by layer, class by class, and what INT8 does to the inputs of each LMA."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.quantize import rules, sessions
from edgekd.quantize.calibration import LARGEST
from edgekd.quantize.dialects import onnxruntime_from_int8
from edgekd.quantize.graph import Graph, Layer
from edgekd.quantize.placement import DEQUANTIZED, float_from_int8, weight_scales
from edgekd.quantize.ptq import decibel
from edgekd.tasks import Task

Array = npt.NDArray[Any]
Row = dict[str, Any]

IMAGES = 128  # are enough to tell which layer loses what
# Below these a layer gets a suggestion. Rounding to 8 bits alone costs 30 to 45 dB on bell-shaped values.
LOW_SQNR_DB = 20.0
SHARP_DROP_DB = 6.0
CLIPPED_SHARE = 0.01
_SIGMAS = 3.0  # the cuts of an LMA cover mu +- 3 sigma
_INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")


@dataclass
class _Sums:
    """Running sums over pairs of values, from which SQNR and cosine follow."""

    expected: float = 0.0
    found: float = 0.0
    product: float = 0.0
    error: float = 0.0
    clipped: int = 0
    count: int = 0

    def add(self, expected: Array, found: Array, clip: float = np.inf) -> None:
        x, y = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
        self.expected += float(x @ x)
        self.found += float(y @ y)
        self.product += float(x @ y)
        self.error += float((x - y) @ (x - y))
        self.clipped += int((np.abs(x) > clip).sum())
        self.count += x.size

    @property
    def sqnr_db(self) -> float:
        return decibel(self.expected, self.error)

    @property
    def cosine(self) -> float:
        norms = np.sqrt(self.expected * self.found)
        return float(self.product / norms) if norms else float(self.expected == self.found)


@dataclass
class _LayerSums:
    own_input: _Sums = field(default_factory=_Sums)
    output: _Sums = field(default_factory=_Sums)


def of(model: onnx.ModelProto, curves: Sequence[Row], images: Array) -> dict[str, Any]:
    """All that a quantized model says about itself: layers, lma, still_float, findings (see below and `rules`).

    model: in the dialect of TensorRT. curves: of the student's activations. images: float32 [N, C, H, W]. A model
    without pairs has nothing to say: all are empty.
    """
    floats, scales = float_from_int8(model)
    if not scales:
        return {"layers": [], "lma": [], "still_float": [], "findings": []}
    graph = Graph(floats)
    return {
        "layers": layers(graph, model, scales, images),
        "lma": lma(graph, curves, scales, images),
        "still_float": still_float(graph, onnxruntime_from_int8(model)),
        "findings": [asdict(finding) for finding in rules.check(model)],
    }


def layers(graph: Graph, quantized: onnx.ModelProto, scales: Mapping[str, float], images: Array) -> list[Row]:
    """What each layer lost, in the order of the graph, from one pass of both models over `images` [N, C, H, W].

    graph: the float model. scales: {tensor: scale} as `quantize` returns them.

    Each row is ready for JSON: layer, quantized; `weights_sqnr_db`, `weights_cosine`: of its weights; `input_sqnr_db`,
    `input_clipped`: what rounding does to its input as the float model has it (null where nothing is rounded);
    `output_sqnr_db`, `output_cosine`: of what it and its activation make in the quantized model, with all that was lost
    before; suggestion: a sentence, empty when the layer is fine.
    """
    deployed = Graph(quantized)
    made = {layer.name: graph.activated(layer) for layer in graph.layers}
    asked = list(dict.fromkeys([*made.values(), *(layer.input for layer in graph.layers)]))
    rounded = {name: name + DEQUANTIZED if name + DEQUANTIZED in deployed.makers else name for name in made.values()}
    size = sessions.batch_size(graph, asked, images)
    sums = {layer.name: _LayerSums() for layer in graph.layers}
    for expected, found in zip(
        sessions.activations(graph, asked, images, size),
        sessions.activations(deployed, list(rounded.values()), images, size),
        strict=True,
    ):
        for layer in graph.layers:
            here, output = sums[layer.name], made[layer.name]
            here.output.add(expected[output], found[rounded[output]])
            if layer.input in scales:
                x, scale = expected[layer.input], scales[layer.input]
                here.own_input.add(x, round_to(x, scale), (LARGEST + 0.5) * scale)
    rows: list[Row] = []
    for layer in graph.layers:
        rows.append(_row(layer, sums[layer.name], _deployed_weight(layer, deployed), rows[-1] if rows else None))
    return rows


def _deployed_weight(layer: Layer, deployed: Graph) -> Array | None:
    """What a layer's weights stand for in the deployed model; None where they are those of the float model."""
    name = layer.node.input[1]
    if name + DEQUANTIZED in deployed.makers:
        return rounded_weights(layer)
    weight = deployed.constants.get(name, layer.weight)
    return None if np.array_equal(weight, layer.weight) else weight


def round_to(values: Array, scale: float) -> Array:
    """What a pair makes of float values: symmetric INT8."""
    codes = np.clip(np.rint(values / np.float32(scale)), -LARGEST - 1, LARGEST)
    rounded: Array = (codes * np.float32(scale)).astype(np.float32)
    return rounded


def _row(layer: Layer, sums: _LayerSums, weight: Array | None, before: Row | None) -> Row:
    weights, quantized = _Sums(), weight is not None
    weights.add(layer.weight, layer.weight if weight is None else weight)
    seen = quantized and sums.own_input.count > 0
    row: Row = {
        "layer": layer.name,
        "quantized": quantized,
        "weights_sqnr_db": weights.sqnr_db,
        "weights_cosine": weights.cosine,
        "input_sqnr_db": sums.own_input.sqnr_db if seen else None,
        "input_clipped": sums.own_input.clipped / sums.own_input.count if seen else None,
        "output_sqnr_db": sums.output.sqnr_db,
        "output_cosine": sums.output.cosine,
    }
    return row | {"suggestion": _suggestion(row, before) if quantized else ""}


def rounded_weights(layer: Layer) -> Array:
    """The weights that a layer has in INT8."""
    shape = [-1 if axis == layer.channel_axis else 1 for axis in range(layer.weight.ndim)]
    scale = weight_scales(layer).reshape(shape)
    rounded: Array = np.rint(layer.weight / scale) * scale
    return rounded


def _suggestion(row: Row, before: Row | None) -> str:
    """What to try for a layer, most likely cause first."""
    name, clipped = row["layer"], row["input_clipped"] or 0.0
    if row["input_sqnr_db"] is not None and row["input_sqnr_db"] < LOW_SQNR_DB:
        if clipped > CLIPPED_SHARE:
            return f"{clipped:.1%} of the inputs of {name} are clipped: calibrate with minmax, or on more images."
        return f"A few large values stretch the input range of {name}: calibrate with percentile or entropy."
    if row["weights_sqnr_db"] < LOW_SQNR_DB:
        return f"A few large weights stretch the channels of {name}: keep it in float, or train with rounding (QAT)."
    drop = before["output_sqnr_db"] - row["output_sqnr_db"] if before else 0.0
    if row["output_sqnr_db"] < LOW_SQNR_DB and drop > SHARP_DROP_DB:
        return f"The error grows by {drop:.0f} dB in {name}, more than its own rounding explains: keep it in float."
    return ""


def classes(task: Task, labels: Array, expected: Array, found: Array, names: Sequence[str]) -> list[Row]:
    """Per class: class, n, float_score, score, change; from labels [N, ...] and the answers of both models."""
    before, after = (task.by_class(outputs, labels, tuple(names)) for outputs in (expected, found))
    return [
        {"class": name, "n": n, "float_score": old, "score": new, "change": None if new is None else new - (old or 0.0)}
        for name, (n, old), (_, new) in zip(names, before, after, strict=False)
    ]


def lma(graph: Graph, curves: Sequence[Row], scales: Mapping[str, float], images: Array) -> list[Row]:
    """What INT8 does to the input of each LMA layer, as the float model has it.

    curves: of `edgekd.activations.curves`, one for each layer by name. Each row is ready for JSON: layer; `max_jump`:
    the largest step of y at a cut; `step`: what one code is worth; `changed_segment`: share of the values that rounding
    moves over a cut; low, high: the range seen; `range_low`, `range_high`: mu -+ 3 sigma; outside: share beyond these.
    """
    known = {curve["name"]: curve for curve in curves}
    regions = [region for region in graph.lma if region.name in known]
    sums = {region.name: _InputSums(known[region.name], scales.get(region.input)) for region in regions}
    for batch in sessions.activations(graph, list(dict.fromkeys(region.input for region in regions)), images):
        for region in regions:
            sums[region.name].add(batch[region.input].ravel())
    return [{"layer": name, **found.row()} for name, found in sums.items()]


@dataclass
class _InputSums:
    """What reaches one LMA layer."""

    curve: Row
    scale: float | None
    changed: int = 0
    outside: int = 0
    count: int = 0
    low: float = np.inf
    high: float = -np.inf

    def add(self, values: Array) -> None:
        cuts = np.asarray(self.curve["cuts"], np.float64)
        rounded = values if self.scale is None else round_to(values, self.scale)
        self.changed += int((np.searchsorted(cuts, values) != np.searchsorted(cuts, rounded)).sum())
        self.outside += int(((values < self.range[0]) | (values > self.range[1])).sum())
        self.count += values.size
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    @property
    def range(self) -> tuple[float, float]:
        reach = _SIGMAS * self.curve["sigma"]
        return self.curve["mu"] - reach, self.curve["mu"] + reach

    def row(self) -> Row:
        return {
            "max_jump": self.curve["max_jump"], "step": self.scale, "changed_segment": self.changed / self.count,
            "low": self.low, "high": self.high, "range_low": self.range[0], "range_high": self.range[1],
            "outside": self.outside / self.count,
        }  # fmt: skip


def still_float(graph: Graph, quantized: onnx.ModelProto) -> list[str]:
    """The layers that ONNX Runtime computes in float all the same, read from the graph that it makes of the model."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimized.onnx"
        sessions.opened(quantized, optimized=str(file))
        optimized = onnx.load(str(file))
    read = {name for node in optimized.graph.node if node.op_type in _INTEGER for name in node.input}
    return [layer.name for layer in graph.layers if f"{layer.node.input[1]}_scale" not in read]
