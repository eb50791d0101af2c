"""Post-training quantization: a float ONNX model and some images become an INT8 model with Q/DQ pairs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.errors import RecipeError, unknown
from edgekd.quantize import calibration, dialects, sessions
from edgekd.quantize.calibration import Method, Ranges
from edgekd.quantize.graph import Graph, load
from edgekd.quantize.placement import pairs, quantized, sources
from edgekd.tasks import Judge

Array = npt.NDArray[Any]
METHODS: tuple[Method, ...] = ("minmax", "entropy", "percentile")
PERCENTILE = 99.99
# What `choose` tries, in order of preference among equals.
CANDIDATES: tuple[tuple[Method, float], ...] = (
    ("minmax", 100.0),
    ("entropy", 100.0),
    ("percentile", 99.99),
    ("percentile", 99.9),
)
Progress = Callable[[float, str], None]


def quantize(
    model: Path,
    out: Path,
    images: Array,
    *,
    calibrate: Method = "minmax",
    percentile: float = PERCENTILE,
    keep_float: Collection[str] = (),
) -> dict[str, Any]:
    """Quantize `model` to `out`, in the dialect of TensorRT (see `dialects` for the others).

    images: float32 [N, C, H, W], as the network takes them. percentile: of the magnitudes, used by that method alone.
    keep_float: names of layers, or LMA layers, to leave in float; `layer_names` lists them.

    Returns:
        method, percentile, images, layers (names), keep_float, lma (names), pairs (how many activations are rounded),
        scales {tensor: scale}, warnings, size_bytes.

    Raises:
        DataError: the model cannot be quantized, or the images do not fit it. RecipeError: no such method or layer.
    """
    prepared = prepare(model, images)
    written = prepared.quantized(calibrate, percentile, keep_float)
    onnx.save(written, str(out))
    return prepared.facts(calibrate, percentile, keep_float) | {"size_bytes": out.stat().st_size}


def layer_names(model: Path) -> list[str]:
    """What `keep_float` can name: the layers with weights, then the LMA layers."""
    return _names(load(model))


@dataclass(frozen=True)
class Prepared:
    """A model with the ranges of its activations: each way of quantizing it from here on is quick."""

    graph: Graph
    ranges: Ranges

    def quantized(self, method: Method, percentile: float, keep_float: Collection[str] = ()) -> onnx.ModelProto:
        """The model in INT8, in the dialect of TensorRT."""
        self._check(method, percentile, keep_float)
        return quantized(self.graph, self.ranges.scales(method, percentile), keep_float)

    def facts(self, method: Method, percentile: float, keep_float: Collection[str] = ()) -> dict[str, Any]:
        """What `quantized` did, ready for JSON."""
        rounded = pairs(self.graph, keep_float)
        scales = self.ranges.scales(method, percentile)
        return {
            "method": method,
            "percentile": percentile if method == "percentile" else None,
            "images": self.ranges.images,
            "layers": [layer.name for layer in self.graph.layers],
            "keep_float": sorted(keep_float),
            "lma": [region.name for region in self.graph.lma],
            "pairs": len(rounded),
            "scales": {tensor: float(scales[self.graph.source(tensor)]) for tensor in rounded},
            "warnings": list(self.ranges.warnings),
        }

    def _check(self, method: Method, percentile: float, keep_float: Collection[str]) -> None:
        if method not in METHODS:
            raise unknown("quantize.calibrate", method, METHODS, noun="way to choose ranges")
        if method == "percentile" and not 50 <= percentile <= 100:
            raise RecipeError(
                f"quantize.percentile = {percentile:g} would clip most of the values",
                allowed="allowed: 50 to 100; 99.9 to 99.999 are usual",
                fix=f"set quantize.percentile = {PERCENTILE}",
                key="quantize.percentile",
            )
        names = _names(self.graph)
        for name in keep_float:
            if name not in names:
                raise unknown("quantize.keep_float", name, names, noun="layer of the model")


def prepare(model: Path, images: Array) -> Prepared:
    """Read a float model and measure its activations on images float32 [N, C, H, W]."""
    graph = load(model)
    return Prepared(graph, calibration.measure(graph, sources(graph), images))


def choose(
    prepared: Prepared,
    images: Array,
    judge: Judge,
    *,
    candidates: Sequence[tuple[Method, float]] = CANDIDATES,
    keep_float: Collection[str] = (),
    on_progress: Progress = lambda share, text: None,
) -> dict[str, Any]:
    """The way of choosing ranges that keeps most of the score, as ONNX Runtime computes it in integers.

    images: a validation set, float32 [N, C, H, W], with its judge; never the test set. Equal scores are told
    apart by the error of the logits.

    Returns:
        method, percentile, score, float_score, n, tried: a row {method, percentile, score, logits_sqnr_db} each.
    """
    sessions.check_images(prepared.graph, images, "validation")
    expected = sessions.logits(prepared.graph.model, images)
    rows: list[dict[str, Any]] = []
    for done, (method, percentile) in enumerate(candidates):
        on_progress(done / len(candidates), f"trying {method}" + f" {percentile:g}" * (method == "percentile"))
        deployed = dialects.onnxruntime_from_int8(prepared.quantized(method, percentile, keep_float))
        found = sessions.logits(deployed, images)
        rows.append({
            "method": method, "percentile": percentile if method == "percentile" else None, "score": judge.score(found),
            "logits_sqnr_db": sqnr_db(expected, found),
        })  # fmt: skip
    best = max(rows, key=lambda row: (judge.goodness(row["score"]), row["logits_sqnr_db"]))
    chosen = {name: best[name] for name in ("method", "percentile", "score")}
    return {**chosen, "float_score": judge.score(expected), "n": len(images), "tried": rows}


def sqnr_db(expected: Array, found: Array) -> float:
    """Signal to quantization noise, 10 log10(sum x^2 / sum (x - y)^2), of any two arrays of one shape."""
    error = expected.astype(np.float64) - found
    return decibel(float(np.square(expected, dtype=np.float64).sum()), float(np.square(error).sum()))


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise), between -200 and 200: JSON has no infinity."""
    smallest = 1e-20 * max(signal, noise, 1e-300)
    return float(10 * np.log10(max(signal, smallest) / max(noise, smallest)))


def _names(graph: Graph) -> list[str]:
    return [layer.name for layer in graph.layers] + [region.name for region in graph.lma]
