"""A heading with what stands under it: how the longer sections are made."""

from __future__ import annotations

from dataclasses import dataclass

from edgekd.report.tables import Table


@dataclass(frozen=True)
class Passage:
    """One heading with its sentences and its table; `name` tells figures where they belong."""

    name: str
    heading: str
    sentences: tuple[str, ...] = ()
    table: Table | None = None
