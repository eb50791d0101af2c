"""How much the size and the choice of a calibration set matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edgekd.quantize import ptq, sessions
from edgekd.quantize.calibration import Method
from edgekd.quantize.graph import load
from edgekd.tasks import Judge

Array = npt.NDArray[Any]

SIZES = (16, 64, 256, 1024)
SEEDS = (0, 1, 2)


def study(
    model: Path,
    drawn: Callable[[int, int], Array],
    images: Array,
    judge: Judge,
    *,
    method: Method,
    percentile: float,
    sizes: Sequence[int] = SIZES,
    seeds: Sequence[int] = SEEDS,
    on_progress: Callable[[float, str], None] = lambda share, text: None,
) -> list[dict[str, Any]]:
    """Quantize a float model with calibration sets of several sizes and seeds.

    drawn: (size, seed) -> calibration images, float32 [N, C, H, W]; a set that turns out smaller than asked for is the
    last size. images: the validation split, with its judge. Returns rows {images, seed, score, logits_sqnr_db}.
    """
    expected = sessions.logits(load(model).model, images)
    rows: list[dict[str, Any]] = []
    for at, size in enumerate(sizes):
        for seed in seeds:
            on_progress((at + 0.5) / len(sizes), f"{size} images, seed {seed}")
            calibration = drawn(size, seed)
            found = sessions.logits(ptq.prepare(model, calibration).quantized(method, percentile), images)
            rows.append({
                "images": len(calibration), "seed": seed, "score": judge.score(found),
                "logits_sqnr_db": ptq.sqnr_db(expected, found),
            })  # fmt: skip
        if rows[-1]["images"] < size:
            break
    return rows
