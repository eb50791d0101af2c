"""One inference after the other."""

from __future__ import annotations

from typing import Any, ClassVar

from edgekd.bench.modes import Mode, turn
from edgekd.registry import register


@register("mode", "single_stream")
class SingleStream(Mode):
    """One sample after the other, each as soon as the last is answered.

    MLPerf Inference Rules, single stream.
    """

    name: ClassVar = "single_stream"

    def __init__(self, *, seconds: float = 10.0) -> None:
        super().__init__(seconds)

    def turns(self) -> list[dict[str, Any]]:
        """One sample a query."""
        return [turn()]
