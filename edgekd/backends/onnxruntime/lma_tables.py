"""Whether LMA layers that read 8-bit codes run faster as tables: both models are timed in turn, as the engine runs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from edgekd.backends.onnxruntime import runner
from edgekd.errors import StageError
from edgekd.quantize import table

_BLOCK_SECONDS = 0.002  # runs of one model before it is the other's turn; the clock's own step does not matter then
_SECONDS = 1.0
_FEWEST, _MOST = 9, 41
_REFUSALS: tuple[type[Exception], ...] = (runner.ProviderError, *runner.FAILURES)


def put(file: Path, settings: dict[str, Any], when: Literal["auto", "never", "always"]) -> dict[str, Any]:
    """Give the model in `file` tables: always, never, or where they are faster by more than the turns differ.

    Facts: lma_tables: names of the layers that are tables; lma_table_ratio: how long the model with tables takes, in
    units of the one without: median, low, high (quartiles) over the turns; None when it was not measured, as where
    onnxruntime cannot run the tables as asked. Raises StageError when it must and cannot.
    """
    form, ratio = onnx.load(str(file)), None
    candidate = table.with_tables(form, "elements") if when != "never" else form
    names = table.tables(candidate)
    if names and when == "auto":
        try:
            ratio = timed(form, candidate, settings)
        except _REFUSALS:  # a provider may compute the layers, and have no tables
            names = []
        else:
            names = names if ratio["high"] < 1 else []
    if names:
        onnx.save(candidate, str(file))
        try:
            runner.session(str(file), settings)
        except _REFUSALS as error:
            raise StageError(
                f"onnxruntime cannot run LMA layers as tables: {' '.join(str(error).split())[:200]}",
                allowed="it runs them in their own form",
                fix="set the backend's option lma_table to auto or never",
            ) from error
    return {"lma_tables": names, "lma_table_ratio": ratio}


def timed(first: onnx.ModelProto, second: onnx.ModelProto, settings: dict[str, Any]) -> dict[str, float]:
    """How long `second` takes, in units of `first`: median and quartiles of the ratio over turns, for one image."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for name, model in (("first", first), ("second", second)):
            onnx.save(model, f"{folder}/{name}.onnx")
            sessions.append(runner.session(f"{folder}/{name}.onnx", settings))
    image = sessions[0].get_inputs()[0]
    x = np.random.default_rng(0).standard_normal([size if isinstance(size, int) else 1 for size in image.shape])
    feed = {image.name: x.astype(np.float32)}
    one = max(_block(session, feed, 1) for session in sessions for _ in range(3))
    calls = max(1, round(_BLOCK_SECONDS / one))
    turns = int(np.clip(_SECONDS / (2 * calls * one), _FEWEST, _MOST))
    ratios = []
    for turn in range(turns):
        # Who goes first changes, so that a drift of the clock rate favours none.
        seconds = {at: _block(sessions[at], feed, calls) for at in ((0, 1) if turn % 2 else (1, 0))}
        ratios.append(seconds[1] / seconds[0])
    low, median, high = (float(value) for value in np.quantile(ratios, (0.25, 0.5, 0.75)))
    return {"median": median, "low": low, "high": high}


def _block(session: Any, feed: dict[str, Any], calls: int) -> float:
    """Seconds for one call."""
    start = time.perf_counter()
    for _ in range(calls):
        session.run(None, feed)
    return (time.perf_counter() - start) / calls
