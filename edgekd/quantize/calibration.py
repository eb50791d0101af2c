"""Ranges of activations over a calibration set: one pass over the images, all ways of choosing a range from it.

The calibrators of onnxruntime.quantization keep every activation of every image (percentile, entropy), and its entropy
calibrator searches no threshold with its default bins. Here a tensor costs 2048 counts, and minmax, percentile and
entropy read the same ones, so that trying them all costs one calibration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgekd.errors import DataError
from edgekd.quantize import sessions
from edgekd.quantize.graph import Graph

Array = npt.NDArray[Any]
Method = Literal["minmax", "entropy", "percentile"]

BINS = 2048
LEVELS = 128  # magnitudes that symmetric INT8 tells apart
LARGEST = 127  # code
FEW_IMAGES = 32
_STRIDE = 8  # bins between the thresholds that entropy tries: 1/256 of the range


@dataclass(frozen=True)
class Ranges:
    """What a calibration set makes of each tensor.

    largest: magnitude. counts: [2048] of magnitudes between 0 and `largest`. images: how many were seen.
    """

    largest: Mapping[str, float]
    counts: Mapping[str, Array]
    images: int
    warnings: tuple[str, ...]

    def scales(self, method: Method, percentile: float) -> dict[str, np.float32]:
        """The scale of symmetric INT8, for each tensor: the value of one code. A tensor of zeros gets 1."""
        return {
            name: np.float32(threshold(self.counts[name], largest, method, percentile) / LARGEST if largest else 1)
            for name, largest in self.largest.items()
        }


def measure(graph: Graph, tensors: Sequence[str], images: Array) -> Ranges:
    """Run the float model over the images, twice: for the ranges, then for the counts in them.

    images: float32 [N, C, H, W]. Raises DataError for images that the model cannot take or that make it overflow.
    """
    sessions.check_images(graph, images, "calibration")
    largest = dict.fromkeys(tensors, 0.0)
    for batch in sessions.activations(graph, tensors, images):
        for name, values in batch.items():
            largest[name] = float(np.maximum(largest[name], np.abs(values).max()))  # keeps a NaN
    check_finite(largest)
    counts = {name: np.zeros(BINS, np.int64) for name in tensors}
    for batch in sessions.activations(graph, tensors, images):
        for name, values in batch.items():
            counts[name] += _counted(values, largest[name])
    return Ranges(largest, counts, len(images), tuple(remarks(largest, images)))


def check_finite(largest: Mapping[str, float]) -> None:
    """Raises DataError unless all magnitudes {tensor: largest} are finite."""
    for name, value in largest.items():
        if not np.isfinite(value):
            raise DataError(
                f"tensor {name} is not finite on the calibration images",
                allowed="expected: every activation of the float model is finite",
                fix="train the network again, or look for images that are far out of range",
            )


def threshold(counts: Array, largest: float, method: Method, percentile: float) -> float:
    """The magnitude that becomes code 127; what lies above is clipped."""
    if method == "percentile":
        wanted = counts.sum() * (percentile / 100)
        return largest * (int(np.searchsorted(np.cumsum(counts), wanted)) + 1) / BINS
    return largest * entropy_bins(counts) / BINS if method == "entropy" else largest


def entropy_bins(counts: Array) -> int:
    """How many of the bins to keep so that 128 levels lose least: the smallest KL(p, q) of the thresholds tried.

    p is the distribution clipped at the threshold; q has 128 levels, and knows nothing of what was clipped. Migacz:
    "8-bit Inference with TensorRT", GTC 2017. As in NVIDIA's own code, exact zeros count as their neighbours do: after
    a ReLU they would outweigh everything.
    """
    # What is clipped joins the last bin kept, so that must be one with values: in a sparse tail most have none.
    last_used = np.maximum.accumulate(np.where(counts > 0, np.arange(BINS), 0))
    stops = np.unique(last_used[np.arange(LEVELS, BINS + 1, _STRIDE) - 1] + 1)
    stops = stops[stops >= LEVELS]
    if not len(stops):
        return BINS
    divergence = divergences(counts, stops)
    return int(stops[len(stops) - 1 - divergence[::-1].argmin()])  # of equals, the one that clips least


def divergences(counts: Array, stops: Array) -> Array:
    """KL(p, q) for each number of bins kept, from sums over bins: [2048], [T] -> [T]."""
    bins = counts.astype(np.float64)
    bins[0] = bins[1]
    below, used_below, entropy_below = (
        np.concatenate(([0.0], np.cumsum(values))) for values in (bins, bins > 0, _times_log(bins))
    )
    edges = -(-np.arange(LEVELS + 1) * stops[:, None] // LEVELS)  # of the levels, in bins: [T, 129]
    total, used = np.diff(below[edges]), np.diff(used_below[edges])
    kept, last, clipped = below[stops], bins[stops - 1], below[-1] - below[stops]
    log_q = np.log(np.divide(total, used, where=total > 0, out=np.ones_like(total)))
    p_log_p = entropy_below[stops] - _times_log(last) + _times_log(last + clipped)
    p_log_q = (total * log_q).sum(1) + clipped * log_q[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = (p_log_p - p_log_q) / below[-1] + np.log(kept / below[-1])
    possible: Array = np.where((kept > 0) & ((last > 0) | (clipped == 0)), divergence, np.inf)
    return possible


def _times_log(values: Array) -> Array:
    product: Array = values * np.log(np.where(values > 0, values, 1))
    return product


def _counted(values: Array, largest: float) -> Array:
    if not largest:
        return np.bincount([0], [values.size], BINS).astype(np.int64)
    index = np.minimum((np.abs(values).ravel() * np.float32(BINS / largest)).astype(np.int64), BINS - 1)
    return np.bincount(index, minlength=BINS)


def remarks(largest: Mapping[str, float], images: Array) -> list[str]:
    """What is odd about calibration images [N, C, H, W], or about the magnitudes {tensor: largest} that they made."""
    found = []
    if len(images) < FEW_IMAGES:
        found.append(f"calibrated on {len(images)} images: fewer than {FEW_IMAGES} rarely show the range of a layer")
    flat = images.reshape(len(images), -1)
    constant = int((flat == flat[:, :1]).all(1).sum())
    if constant:
        found.append(f"{constant} of {len(images)} calibration images are of one value throughout")
    zero = [name for name, value in largest.items() if not value]
    if zero:
        found.append(f"always zero on the calibration images: {', '.join(zero)}; scale 1 is used")
    return found
