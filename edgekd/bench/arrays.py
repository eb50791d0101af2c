"""What a device sent back, as arrays: checked before anything is made of it, or while it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.bench.latencies import Table, computing_ns
from edgekd.errors import StageError
from edgekd.tasks import Judge


def table_from_latencies(path: Path, name: str) -> Table:
    """The latencies in a file. Raises StageError when it holds something else."""
    table = array_from(path)
    if table.ndim != 2 or table.shape[1] != 6 or table.dtype != np.int64 or (computing_ns(table) <= 0).any():
        raise StageError(
            f"{path.name} does not hold the latencies of the {name}: {table.dtype} {list(table.shape)}",
            allowed="expected: int64 [N, 6], durations above 0",
            fix="measure again: edgekd bench",
        )
    return table


def quality_from_logits(path: Path, judge: Judge, name: str) -> npt.NDArray[Any]:
    """How good each answer [N, ...] in a file is, [N], see `Task.quality`. Raises StageError when it cannot be told."""
    logits, shape = array_from(path), (len(judge.labels), *judge.outputs)
    if logits.shape != shape:
        raise StageError(
            f"the {name} gave logits {list(logits.shape)} for {len(judge.labels)} samples",
            allowed=f"expected: {list(shape)}",
            fix="see whether the engine runs by itself, and measure again",
        )
    finite = np.isfinite(logits.reshape(len(logits), -1)).all(axis=1)
    if not finite.all():
        what = f"the {name}'s logits are not finite, first for sample {int(finite.argmin())}"
        raise StageError(what, allowed="expected: finite numbers", fix="check the export and the precision")
    return judge.task.quality(logits, judge.labels)


def array_from(path: Path) -> npt.NDArray[Any]:
    """An array from a device: never a pickle, and never more memory than the file has bytes."""
    try:
        array: npt.NDArray[Any] = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
        return array
    except (ValueError, OSError, EOFError) as error:
        raise StageError(
            f"{path.name} from the device is no array: {error}", allowed="expected: a .npy file", fix="measure again"
        ) from error


@contextmanager
def understood(url: str) -> Iterator[None]:
    """Around what is made of an agent's result.json. Raises StageError when that is not what an agent writes."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise StageError(
            f'what the agent on "{url}" wrote is not understood: {type(error).__name__}: {error}',
            allowed="expected: its result.json, as it was written",
            fix="measure again: edgekd bench",
        ) from error
