"""What each release of TensorRT reads: its newest opset and its operators, from releases.yaml."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekd.yamlfile import mapping_from_yaml

TABLE = Path(__file__).with_name("releases.yaml")


@dataclass(frozen=True)
class Release:
    """A release in the table: the version that it begins with, and what its parser takes."""

    version: tuple[int, ...]
    opset: int
    operators: frozenset[str]
    since: Mapping[str, str]  # of every operator that some release takes: the first that does

    @property
    def name(self) -> str:
        """As NVIDIA writes it."""
        return ".".join(map(str, self.version))


@functools.cache
def releases() -> tuple[Release, ...]:
    """All in the table, the oldest first. An operator stays once it is there."""
    content, _ = mapping_from_yaml(TABLE.read_text(encoding="utf-8"), TABLE.name)
    since = {operator: row["release"] for row in content["releases"] for operator in row["operators"]}
    found, operators = [], frozenset[str]()
    for row in content["releases"]:
        operators |= frozenset(row["operators"])
        found.append(Release(version_of(row["release"]), row["opset"], operators, since))
    return tuple(found)


def release_of(version: str) -> Release:
    """The last release in the table that is not newer than `version`; the oldest for one before all of them."""
    known = releases()
    return next((one for one in reversed(known) if one.version <= version_of(version)), known[0])


def version_of(text: str) -> tuple[int, ...]:
    """(10, 3) of 10.3.0.30: what a release's operators depend on."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
