"""Several samples at once, as from several cameras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from edgekd.bench.latencies import Table
from edgekd.bench.modes import Mode, required, turn
from edgekd.registry import register


@register("mode", "multi_stream")
class MultiStream(Mode):
    """Queries of several samples, one query after the other: its latency is that of the last sample.

    MLPerf Inference Rules, multiple stream. An engine that takes batches gets the query as one, another one answers
    sample by sample.
    """

    name: ClassVar = "multi_stream"

    def __init__(self, *, seconds: float = 20.0, samples_per_query: int = 8) -> None:
        super().__init__(seconds)
        required(samples_per_query > 1, "samples_per_query", samples_per_query, "2 or more")
        self.samples_per_query = samples_per_query

    def turns(self) -> list[dict[str, Any]]:
        """All samples of a query at once."""
        return [turn(samples=self.samples_per_query)]

    def findings(self, measured: Mapping[str, Any], tables: Mapping[str, Table]) -> dict[str, Any]:
        """The size of a query, and whether each engine took it as one batch."""
        batched = {name: launches[0]["warm_up"][0]["batched"] for name, launches in measured["models"].items()}
        return {"samples_per_query": self.samples_per_query, "batched": batched}
