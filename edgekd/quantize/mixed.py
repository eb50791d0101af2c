"""Which layers to keep in float so that accuracy stays within the budget: as few as the time allows to find."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.quantize import dialects, sessions
from edgekd.quantize.calibration import Method
from edgekd.quantize.ptq import Prepared, sqnr_db
from edgekd.tasks import ROUNDING, Judge

Array = npt.NDArray[Any]
Progress = Callable[[float, str], None]

SENSITIVITY_IMAGES = 128


@dataclass
class Search:
    """A search for the fewest layers in float, which keeps the best of what it has seen.

    evaluate: how good it is with these layers in float, more is better. ranked: all layers, the one that loses most
    first. target: what to keep of that. seconds: when to stop.
    """

    evaluate: Callable[[Collection[str]], float]
    ranked: Sequence[str]
    target: float
    seconds: float
    on_progress: Progress = lambda share, text: None
    tried: dict[frozenset[str], float] = field(default_factory=dict, init=False)
    _start: float = field(default=0.0, init=False)

    def run(self) -> dict[str, Any]:
        """First how many of the ranked layers are needed, by halving; then which of these can go back to INT8.

        Returns:
            keep_float, score, met (the target is met), out_of_time, tried: a row {keep_float: how many, score} each.
        """
        self._start = time.monotonic()
        complete = self._search()
        best = self.best()
        return {
            "keep_float": sorted(best), "score": self.tried[best], "met": self._meets(best),
            "out_of_time": not complete,
            "tried": [{"keep_float": len(kept), "score": accuracy} for kept, accuracy in self.tried.items()],
        }  # fmt: skip

    def best(self) -> frozenset[str]:
        """The fewest layers that meet the target; when none does, those with the best accuracy."""
        return min(self.tried, key=self._cost)

    def _cost(self, kept: frozenset[str]) -> tuple[float, ...]:
        accuracy = self.tried[kept]
        return (0, len(kept), -accuracy) if self._meets(kept) else (1, -accuracy, len(kept))

    def _search(self) -> bool:
        """Whether it came to its end in time."""
        self._try(frozenset())
        low, high = 0, len(self.ranked)  # `low` layers in float are too few; `high` are enough, as far as is known
        if self._meets(frozenset()):
            return True
        while high - low > 1:
            if self._out_of_time():
                return False
            middle = (low + high) // 2
            kept = frozenset(self.ranked[:middle])
            self._try(kept)
            low, high = (low, middle) if self._meets(kept) else (middle, high)
        if high == len(self.ranked):  # the float model itself: not a quantization, but it is known to be accurate
            self._try(frozenset(self.ranked))
        for name in reversed(self.ranked[:high]):
            if self._out_of_time():
                return False
            fewer = self.best() - {name}
            if fewer not in self.tried:
                self._try(fewer)
        return True

    def _try(self, kept: frozenset[str]) -> None:
        spent = min(1.0, (time.monotonic() - self._start) / self.seconds) if self.seconds else 1.0
        self.on_progress(spent, f"{len(kept)} of {len(self.ranked)} layers in float")
        self.tried[kept] = self.evaluate(kept)

    def _meets(self, kept: frozenset[str]) -> bool:
        return self.tried[kept] >= self.target - ROUNDING

    def _out_of_time(self) -> bool:
        return time.monotonic() - self._start >= self.seconds


def search(
    prepared: Prepared,
    images: Array,
    judge: Judge,
    *,
    method: Method,
    percentile: float,
    target: float,
    seconds: float,
    keep_float: Collection[str] = (),
    on_progress: Progress = lambda share, text: None,
) -> dict[str, Any]:
    """Find the layers to keep in float so that the score is `target`, or that of the float model if that is worse.

    images: a validation set, float32 [N, C, H, W], with its judge. keep_float: layers that are in float in any case.
    At most a tenth of the time goes into ranking the layers. Returns what `Search.run` does, with `float_score`
    and `sensitivity_db` {layer: SQNR of the logits with this layer alone in INT8}.
    """
    sessions.check_images(prepared.graph, images, "validation")
    float_score = judge.score(sessions.logits(prepared.graph.model, images))

    def evaluate(kept: Collection[str]) -> float:
        deployed = dialects.onnxruntime_from_int8(prepared.quantized(method, percentile, {*kept, *keep_float}))
        return judge.goodness(judge.score(sessions.logits(deployed, images)))

    few = images[:SENSITIVITY_IMAGES]
    found = sensitivity(prepared, few, method=method, percentile=percentile, seconds=seconds / 10)
    open_ = (layer.name for layer in prepared.graph.layers if layer.name not in keep_float)
    ranked = sorted(open_, key=lambda name: found.get(name, np.inf))
    least = min(judge.goodness(target), judge.goodness(float_score))
    result = Search(evaluate, ranked, least, seconds, on_progress).run()
    for row in (result, *result["tried"]):
        row["score"] = judge.goodness(row["score"])
    result["keep_float"] = sorted({*result["keep_float"], *keep_float})
    return result | {"float_score": float_score, "sensitivity_db": found}


def sensitivity(
    prepared: Prepared, images: Array, *, method: Method, percentile: float, seconds: float
) -> dict[str, float]:
    """SQNR in dB of the logits when one layer alone is in INT8, low is sensitive; as many layers as the time allows."""
    names = [layer.name for layer in prepared.graph.layers]
    expected, end = sessions.logits(prepared.graph.model, images), time.monotonic() + seconds
    found: dict[str, float] = {}
    for name in names:
        if found and time.monotonic() >= end:
            break
        others = [other for other in names if other != name]
        alone = prepared.quantized(method, percentile, others)
        found[name] = sqnr_db(expected, sessions.logits(alone, images))
    return found
