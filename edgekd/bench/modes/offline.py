"""As many samples a second as there can be."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from edgekd.bench.latencies import SAMPLES, Table, computing_ns, of_batch, speedups
from edgekd.bench.modes import Mode, required, turn
from edgekd.errors import StageError
from edgekd.registry import register
from edgekd.stats import Floats


@register("mode", "offline")
class Offline(Mode):
    """All samples are there from the start: throughput and latency by batch size.

    MLPerf Inference Rules, offline, for every batch size of a sweep. The engines must take batches.
    """

    name: ClassVar = "offline"
    compares: ClassVar = "throughput, each at its best batch size"
    needs_batches: ClassVar = True

    def __init__(self, *, seconds: float = 30.0, batches: list[int] = [1, 2, 4, 8, 16, 32]) -> None:  # noqa: B006
        super().__init__(seconds)
        rising = bool(batches) and batches[0] > 0 and all(a < b for a, b in pairwise(batches))
        required(rising, "batches", batches, "batch sizes, each above the one before")
        self.batches = batches

    def turns(self) -> list[dict[str, Any]]:
        """Every batch size in every round."""
        return [turn(samples=batch) for batch in self.batches]

    def series(self, table: Table) -> dict[str, Table]:
        """Every batch size by itself."""
        return {f" at batch {batch}": of_batch(table, batch) for batch in self.batches}

    def speedups(self, student: Table, teacher: Table) -> Floats:
        """By the samples that each computes in a second."""
        ours, theirs = (_best(self._sweep(table)) for table in (student, teacher))
        return speedups(of_batch(student, ours), of_batch(teacher, theirs)) * (ours / theirs)

    def findings(self, measured: Mapping[str, Any], tables: Mapping[str, Table]) -> dict[str, Any]:
        """Throughput and latency of each model by batch size. Raises StageError for an engine that takes no batches."""
        for name, launches in measured["models"].items():
            if not all(one["batched"] for one in launches[0]["warm_up"]):
                raise StageError(
                    f"benchmark.mode = offline: the {name}'s engine takes one sample at a time",
                    allowed="it is for engines that take batches",
                    fix="set export.batch = dynamic, or benchmark.mode = single_stream",
                )
        sweep = {name: self._sweep(table) for name, table in tables.items()}
        return {"sweep": sweep, "best_batch": {name: _best(rows) for name, rows in sweep.items()}}

    def _sweep(self, table: Table) -> list[dict[str, Any]]:
        rows = []
        for batch in self.batches:
            p50, p90 = np.quantile(computing_ns(of_batch(table, batch)) / 1e6, [0.5, 0.9])
            queries = int((table[:, SAMPLES] == batch).sum())
            rows.append(
                {
                    "batch": batch,
                    "p50_ms": float(p50),
                    "p90_ms": float(p90),
                    "throughput_per_s": float(1e3 * batch / p50),
                    "queries": queries,
                }
            )
        return rows


def _best(sweep: list[dict[str, Any]]) -> int:
    """The batch size of the highest throughput."""
    return int(max(sweep, key=lambda row: row["throughput_per_s"])["batch"])
