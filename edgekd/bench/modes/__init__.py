"""How engines are asked, and what their answers say: what a recipe names under `benchmark.mode`.

A mode is a class under `@register("mode", NAME)` that keeps the contract below; its keyword-only parameters are its
options, which stand beside `mode` in the recipe. It tells the agent what turns the models take, and makes of their
latencies what the report shows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from edgekd.bench.latencies import Table, of_batch, speedups
from edgekd.errors import RecipeError
from edgekd.stats import Floats

BLOCK_S = 0.05  # long against a scheduler tick, short against what heat and other programs do


def turn(*, samples: int = 1, every_ns: int = 0, block_seconds: float = BLOCK_S) -> dict[str, Any]:
    """A block of queries of so many samples each, one `every_ns`, or one after the other when that is 0."""
    return {"samples": samples, "every_ns": every_ns, "block_seconds": block_seconds, "end_to_end": False}


def required(condition: bool, option: str, value: Any, allowed: str) -> None:
    """Raises RecipeError for a value of an option that no measurement can be made with."""
    if not condition:
        key = f"benchmark.{option}"
        raise RecipeError(
            f"{key} = {value} is not valid", allowed=f"expected: {allowed}", fix=f"correct {key}", key=key
        )


class Mode(ABC):
    """A way of asking. `seconds`: timed, all engines together, in all launches."""

    name: ClassVar[str]
    # What the speed-up is a ratio of.
    compares: ClassVar[str] = "median latency"
    # Queries of several samples that an engine for one sample cannot answer.
    needs_batches: ClassVar[bool] = False
    # How the reasons begin that do not make its result INVALID: it is there to find such things.
    looks_for: ClassVar[tuple[str, ...]] = ()

    def __init__(self, seconds: float) -> None:
        required(seconds > 0, "seconds", seconds, "above 0")
        self.seconds = seconds

    @abstractmethod
    def turns(self) -> list[dict[str, Any]]:
        """What every model does in each round, see `turn`."""

    def series(self, table: Table) -> dict[str, Table]:
        """The rows that must be steady by themselves, by what they are called beside the model's name."""
        return {"": table}

    def headline(self, table: Table) -> Table:
        """The rows whose latency stands for the model."""
        return of_batch(table, self.turns()[0]["samples"])

    def speedups(self, student: Table, teacher: Table) -> Floats:
        """How much faster the student is, by launch."""
        return speedups(student, teacher)

    def findings(self, measured: Mapping[str, Any], tables: Mapping[str, Table]) -> dict[str, Any]:
        """What only this mode finds, ready for JSON. measured: what the agent wrote; tables by model."""
        return {}
