"""What a command line asks for: the recipe, the target, the devices, and the job that they make."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.cli.options import STORE
from edgekd.errors import EdgekdError

if TYPE_CHECKING:
    from edgekd.inventory import Place
    from edgekd.stages import Job
    from edgekd.terminal import Terminal

DEFAULT_TARGET = "local"


@dataclass(frozen=True)
class Asked:
    """What a command line asks for."""

    command: str
    recipe: str | None
    target: str | None
    devices: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    store: Path = STORE
    backend: str | None = None

    @property
    def line(self) -> str:
        """The command line that reproduces it."""
        return shlex.join(["edgekd", self.command, *self.words(self.devices, self.target)])

    @property
    def spreads(self) -> bool:
        """Whether the recipe's student is made for several boards."""
        from edgekd import recipe as recipes

        return recipes.load(self.recipe, self.overrides).student.network == "spread"

    def words(self, devices: Sequence[str], target: str | None) -> list[str]:
        """What stands behind the command's name, for these devices and this target."""
        given = [*([("--target", target)] if target else []), *(("--device", device) for device in devices)]
        given += [("--backend", self.backend)] if self.backend else []
        given += [("--set", override) for override in self.overrides]
        return [*([self.recipe] if self.recipe else []), *(word for pair in given for word in pair)]

    def target_at(self, place: Place | None) -> str:
        """The target: what the command line names wins over what the inventory has for the device."""
        return self.target or (place.target if place else None) or DEFAULT_TARGET

    def job(self, terminal: Terminal, place: Place | None = None, run_id: str | None = None) -> Job:
        """The job, on a device other than the target's own."""
        from edgekd import recipe as recipes
        from edgekd import target as targets
        from edgekd.artifact import Store
        from edgekd.stages import Job

        loaded, now, target = recipes.load(self.recipe, self.overrides), datetime.now(UTC), self.target_at(place)
        return Job(
            recipe=loaded,
            target=targets.load(target, self.backend),
            store=Store(self.store),
            run_id=run_id or f"{now:%Y%m%d-%H%M%S}-{loaded.name}-{os.getpid()}",
            created=now.isoformat(timespec="seconds"),
            command=shlex.join(["edgekd", self.command, *self.words(self.devices, target)]),
            device=place.url if place else "",
            on_progress=terminal.on_progress,
        )


@contextmanager
def located(job: Job) -> Iterator[None]:
    """Errors about a key of the recipe say where it was given."""
    try:
        yield
    except EdgekdError as error:
        if error.key:
            job.recipe.origin.locate(error)
        raise
