"""The options that several commands share, and the terminal that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edgekd.terminal import Terminal

RecipeArgument = Annotated[
    str | None, typer.Argument(metavar="RECIPE", help="A file, or a shipped recipe's name. Default: ./edgekd.yaml")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable.")
]
TargetOption = Annotated[str, typer.Option("--target", "-t", help="Where the student must run: a name or a file.")]
WhereOption = Annotated[
    str | None,
    typer.Option("--target", "-t", help="Where the student must run. Default: that of ./devices.yaml, else local."),
]
DeviceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--device", metavar="URL|NAME|tag:TAG|all",
        help="What to measure on, repeatable; names are those of ./devices.yaml. Default: the target's.",
    ),
]  # fmt: skip
RunIdOption = Annotated[
    str | None, typer.Option("--run-id", hidden=True, help="How several boards' runs name the run of one.")
]
BackendOption = Annotated[
    str | None, typer.Option("--backend", metavar="NAME", help="Another backend than the target's first.")
]
StoreOption = Annotated[
    Path, typer.Option("--store", envvar="EDGEKD_STORE", help="Where artifacts and reports are kept.")
]
LockClocksOption = Annotated[
    bool, typer.Option("--lock-clocks", help="Hold the device's clocks at their highest meanwhile; needs root there.")
]
LoadgenOption = Annotated[
    bool, typer.Option("--loadgen", help="Time both with MLPerf's LoadGen too, on this machine, as a cross-check.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show which stages would run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print also what each stage reads, and Python's warnings.")
]
ColorOption = Annotated[bool, typer.Option("--no-color", help="Print no colour; the variable NO_COLOR does the same.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
STORE = Path(".edgekd")


def terminal_of(no_color: bool, verbosity: int = 0) -> Terminal:
    """The terminal as the options want it. verbosity: -1 results and errors only, 0, 1 also what each stage reads."""
    from edgekd.terminal import Terminal

    return Terminal(verbosity, color=not no_color)
