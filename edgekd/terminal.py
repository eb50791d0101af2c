"""What the user sees while stages run: progress and logs on stderr, results on stdout."""

from __future__ import annotations

import logging
import os
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from edgekd.documents import printable
from edgekd.pipeline import StageEvent

# Without a terminal, a long stage still gives a sign of life this often.
SIGN_OF_LIFE_SECONDS = 15.0
LEVELS = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}
LABEL_CHARACTERS = 22


class Terminal:
    """Progress of a pipeline: a bar with the time left on a terminal, plain lines elsewhere.

    verbosity: -1 shows results and errors only, 0 progress and warnings, 1 also what is called.
    """

    def __init__(self, verbosity: int = 0, *, color: bool = True) -> None:
        plain = not color or bool(os.environ.get("NO_COLOR"))
        # Without a colour system, no control codes at all: bold and dim go as well.
        colors = None if plain else "auto"
        self.out = _Results(color_system=colors, highlight=False, soft_wrap=True)  # type: ignore[arg-type]
        self.err = Console(color_system=colors, highlight=False, stderr=True, quiet=verbosity < 0)  # type: ignore[arg-type]
        self._live = self.err.is_terminal and "CI" not in os.environ and verbosity >= 0
        self._bar = Progress(
            TextColumn("{task.description:<16}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True), TextColumn("[dim]{task.fields[text]}"),
            console=self.err, transient=True,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._stage, self._started, self._spoken = "", 0.0, 0.0
        self._show_log(LEVELS[verbosity])

    def _show_log(self, level: int) -> None:
        """Print the log of edgekd; Python's warnings are for those who asked for more."""
        logging.captureWarnings(True)
        handler = _Lines(self.err)
        for name, shown in (("edgekd", True), ("py.warnings", level <= logging.INFO)):
            log = logging.getLogger(name)
            log.setLevel(level)
            log.handlers = [handler if shown else logging.NullHandler()]
            log.propagate = False

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
            self._line(label, "reused")
        elif event.what == "wait":
            self._line(label, "another run is making it; waiting")
        elif event.what == "run":
            self._stage, self._started, self._spoken = label, time.monotonic(), time.monotonic()
            if self._live:
                self._task = self._bar.add_task(event.stage, total=1.0, text="")
            else:
                self._line(label, "...")
        elif self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._line(label, f"done in {time.monotonic() - self._started:.1f} s")
            self._task, self._stage = None, ""

    def on_progress(self, share: float, text: str) -> None:
        """Show how far the running stage is: share from 0 to 1, and a few words."""
        if self._task is not None:
            self._bar.update(self._task, completed=share, text=text)
        elif self._stage and time.monotonic() - self._spoken > SIGN_OF_LIFE_SECONDS:
            self._spoken = time.monotonic()
            self._line(self._stage, f"{share:.0%}  {text}")

    def say_of(self, name: str, text: str) -> None:
        """Show a line that another process has said."""
        self._line(name, text)

    def _line(self, label: str, text: str) -> None:
        self.err.print(f"{label:<{LABEL_CHARACTERS}} {text}", markup=False, soft_wrap=True)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table to stdout, its cells as they are: a bracket is no markup, a board's escape code no code."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self.out.print(table)

    def entries(self, kind: str, rows: Sequence[tuple[str, str, str]]) -> None:
        """Print what there is of a kind to stdout: names, each with a summary and its options beside it."""
        self.out.print(kind, style="bold", markup=False)
        indent = " " * (4 + max((len(name) for name, _, _ in rows), default=0))
        for name, summary, options in rows:
            lines = [line for text in (summary, options) for line in self._wrapped(text, len(indent))]
            self.say(
                "\n".join(
                    f"{'  ' + name if not number else '':<{len(indent)}}{line}"
                    for number, line in enumerate(lines or [""])
                )
            )
        self.say("")

    def _wrapped(self, text: str, indent: int) -> list[str]:
        # Options are cut between them only; a narrow terminal must not give a width below one word.
        return textwrap.wrap(text, max(20, self.out.width - indent), break_long_words=False, break_on_hyphens=False)

    def say(self, text: str) -> None:
        """Print a line to stdout."""
        self.out.print(text, markup=False)


class _Results(Console):
    """A console that leaves it to the command line what a closed pipe means."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Lines(logging.Handler):
    """Log records as lines of the console, above the progress bar if there is one."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(f"{record.levelname.lower()}: {record.getMessage()}", markup=False, soft_wrap=True)
