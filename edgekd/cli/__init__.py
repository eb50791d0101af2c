"""The command line: parse, call, print. Nothing is decided here, and torch is not imported.

Exit codes: 0 ok, 1 internal, 2 recipe or usage, 3 missing backend or device, 4 a stage failed, 5 budget missed,
6 result INVALID, 130 interrupted.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from edgekd import __version__
from edgekd.artifact import FULL
from edgekd.cli import evaluating, looking, preparing, running
from edgekd.errors import (
    BoardFailed,
    BudgetMissed,
    EdgekdError,
    MissingError,
    RecipeError,
    ResultInvalid,
    StoreError,
)

INTERRUPTED = 130
# Typer brings its own copy of click's exceptions: what a command line can do wrong is their common ancestor.
USAGE: type[typer.BadParameter] = typer.BadParameter.__mro__[2]  # type: ignore[assignment]

app = typer.Typer(
    name="edgekd", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a big teacher network to a small student measured on your own board.",
)  # fmt: skip

# In the order in which a project meets them.
COMMANDS: dict[str, Callable[..., None]] = {
    "init": preparing.init,
    "doctor": looking.doctor,
    "list": looking.list_,
    "schema": looking.schema,
    "calib": preparing.calib,
    "check": looking.check,
    "plan": running.plan,
    **{name: running.stage_command(name, summary) for name, summary in running.STAGE_COMMANDS.items()},
    "eval": evaluating.eval_,
    "import": running.import_,
    "report": looking.report,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: every error becomes three lines and an exit code, never a traceback."""
    # Read by OpenMP when torch loads. Waiting threads spin by default: on a machine that does anything else, training
    # small networks with two threads then takes tens of times as long as with one (DECISIONS.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a character
    sys.exit(_exit_code(sys.argv[1:] if arguments is None else arguments))


def _exit_code(arguments: list[str]) -> int:
    try:
        code = app(arguments, prog_name="edgekd", standalone_mode=False) or 0
        sys.stdout.flush()
        return int(code) if code != INTERRUPTED else _interrupted()
    except EdgekdError as error:
        return _failed(error, arguments)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except USAGE as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "edgekd")
        what = f"{command}: {error.format_message().rstrip('.')}"
        misunderstood = "the command line is not understood"
        return _failed(RecipeError(what, allowed=misunderstood, fix=f"see: {command} --help"), arguments)
    except (BrokenPipeError, SystemExit):  # Typer exits on it: the reader has seen enough, as in edgekd list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its exit
        return 0
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _failed(_unexpected(error), arguments)


def _unexpected(error: Exception) -> EdgekdError:
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("edgekd"):
        return MissingError(
            f"the Python package {error.name!r} is not installed",
            allowed="training and export need more than the plain install",
            fix="pip install 'edgekd[train]', and see: edgekd doctor",
        )
    # Not asked of tempfile, which writes a file to find out.
    temporary = f"temporary files are in {os.environ.get('TMPDIR') or '/tmp'}; TMPDIR names another folder"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename2 or error.filename
        what = f"the disk is full{f': {place} cannot be written' if place else ''}"
        return StoreError(what, allowed=temporary, fix=FULL)
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):  # in Python's words
        what = "no temporary file can be written: the disk is full, or the folder is not yours to write"
        return StoreError(what, allowed=temporary, fix=FULL)
    return EdgekdError(
        f"internal: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        allowed="this is a fault of edgekd, not of yours",
        fix="run it again with --debug, and report what it prints",
    )


def _failed(error: EdgekdError, arguments: list[str]) -> int:
    """Print an error; its exit code."""
    if "--debug" in arguments:
        import traceback

        traceback.print_exception(error)
    # These come after the report: that is the one document, and says so.
    if "--json" in arguments and not isinstance(error, BudgetMissed | ResultInvalid | BoardFailed):
        parts = {"what": error.position + error.what, "allowed": error.allowed, "fix": error.fix}
        print(json.dumps({"error": parts, "exit_code": error.exit_code}))
    print(error, file=sys.stderr)
    return error.exit_code


def _interrupted() -> int:
    print("interrupted: the next run goes on from here", file=sys.stderr)
    return INTERRUPTED


@app.callback(invoke_without_command=True)
def _edgekd(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"edgekd {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
