"""What the user sees while stages run: progress and logs on stderr, results on stdout."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from edgekd.pipeline import StageEvent

QUIET, NORMAL, VERBOSE = -1, 0, 1
# Without a terminal, a long stage still gives a sign of life this often.
SIGN_OF_LIFE_SECONDS = 15.0


class Terminal:
    """Progress of a pipeline: a bar with the time left on a terminal, plain lines elsewhere."""

    def __init__(self, verbosity: int = NORMAL, *, color: bool = True) -> None:
        plain = not color or "NO_COLOR" in os.environ
        self.out = Console(no_color=plain, highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, no_color=plain, highlight=False, quiet=verbosity == QUIET)
        self.verbosity = verbosity
        self._live = self.err.is_terminal and "CI" not in os.environ and verbosity != QUIET
        self._bar = Progress(
            TextColumn("{task.description:<16}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True), TextColumn("[dim]{task.fields[text]}"),
            console=self.err, transient=True,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._stage, self._started, self._spoken = "", 0.0, 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        """While stages run."""
        if not self._live:
            yield
            return
        with self._bar:
            yield

    def on_stage(self, event: StageEvent) -> None:
        """Show what happens to a stage."""
        label = f"[{event.number}/{event.total}] {event.stage}"
        if event.what == "reuse":
            self._stage = ""
            self.err.print(f"{label:<22} reused", markup=False)
        elif event.what == "wait":
            self.err.print(f"{label:<22} another run is making it; waiting", markup=False)
        elif event.what == "run":
            self._stage, self._started, self._spoken = label, time.monotonic(), time.monotonic()
            if self._live:
                self._task = self._bar.add_task(event.stage, total=1.0, text="")
            else:
                self.err.print(f"{label:<22} ...", markup=False)
        elif self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
                self._task = None
            self.err.print(f"{label:<22} done in {time.monotonic() - self._started:.1f} s", markup=False)

    def on_progress(self, share: float, text: str) -> None:
        """Show how far the running stage is: share from 0 to 1, and a few words."""
        if self._task is not None:
            self._bar.update(self._task, completed=share, text=text)
        elif self._stage and not self._live and time.monotonic() - self._spoken > SIGN_OF_LIFE_SECONDS:
            self._spoken = time.monotonic()
            self.err.print(f"{self._stage:<22} {share:.0%}  {text}", markup=False)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table to stdout."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.out.print(table)

    def say(self, text: str) -> None:
        """Print a line to stdout."""
        self.out.print(text, markup=False)


def show_error(text: str) -> None:
    """Print an error to stderr, uncoloured and unwrapped: it is read by people and by scripts."""
    print(text, file=sys.stderr)
