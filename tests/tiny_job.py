"""A real job that is as cheap as a job can be."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from edgekd import recipe as recipes
from edgekd import target as targets
from edgekd.artifact import Store
from edgekd.stages import Job

TINY = """\
name: tiny
data: {source: digits, train_limit: 200, test_limit: 50}
teacher:
  network: resnet
  depth: 8
  width: 0.25
  train: {epochs: 1}
student:
  network: resnet
  depth: 8
  width: 0.25
  activation: lma
distill:
  method: kd
  train: {epochs: 1}
benchmark: {seconds: 0.1, launches: 6}
"""
# No teacher.
ALONE = """\
name: alone
data: {source: digits, train_limit: 200, test_limit: 50}
student:
  network: resnet
  depth: 8
  width: 0.25
  activation: lma
distill:
  method: online_peers
  peers: 2
  train: {epochs: 1}
benchmark: {seconds: 0.1, launches: 6}
"""
# One student on three boards.
SPREAD = (
    TINY[: TINY.index("student:")].replace("0.25", "0.375")
    + """\
student:
  network: spread
  part: {network: resnet, depth: 8, width: 0.25}
  boards: 3
  copies: 2
  filters: 24
distill:
  method: spread
  scratch: false
  train: {epochs: 1}
benchmark: {seconds: 0.1, launches: 6}
"""
)
_numbers = itertools.count()


def make_job(store: Path, *overrides: str, recipe: str = TINY, target: str = "local") -> Job:
    """The tiny job, or one that differs from it by overrides."""
    return Job(
        recipe=recipes.parse(recipe, name="tiny.yaml", overrides=overrides),
        target=targets.load(target),
        store=Store(store),
        run_id=f"20260101-{next(_numbers):06}-tiny",
        created="2026-01-01T00:00:00+00:00",
        command="edgekd run tiny.yaml",
    )


@dataclass(frozen=True)
class Done:
    """A store in which the tiny job has been run to its end, once."""

    store: Path
    run_id: str
