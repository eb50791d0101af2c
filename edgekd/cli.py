"""The command line: parse, call, print. Nothing is decided here, and torch is not imported.

Exit codes: 0 ok, 1 internal, 2 recipe or usage, 3 missing backend or device, 4 a stage failed, 5 budget missed,
6 result INVALID, 130 interrupted.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd import __version__
from edgekd.errors import BudgetMissed, EdgekdError, MissingError, RecipeError, ResultInvalid, unknown

if TYPE_CHECKING:
    from edgekd.artifact import Store
    from edgekd.report import Document
    from edgekd.stages import Job
    from edgekd.terminal import Terminal

INTERRUPTED = 130
# Typer brings its own copy of click's exceptions: what a command line can do wrong is their common ancestor.
USAGE: type[typer.BadParameter] = typer.BadParameter.__mro__[2]  # type: ignore[assignment]

app = typer.Typer(
    name="edgekd", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a big teacher network to a small student measured on your own board.",
)  # fmt: skip

RecipeArgument = Annotated[
    str | None, typer.Argument(metavar="RECIPE", help="A file, or a shipped recipe's name. Default: ./edgekd.yaml")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeatable.")
]
TargetOption = Annotated[str, typer.Option("--target", "-t", help="Where the student must run: a name or a file.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="URL", help="The machine to measure on; default: the target's.")
]
StoreOption = Annotated[
    Path, typer.Option("--store", envvar="EDGEKD_STORE", help="Where artifacts and reports are kept.")
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
# What of the report's ladder fits on a terminal of 80 columns.
LADDER_COLUMNS = ("Rung", "Top-1", "95% interval", "To teacher", "Size", "Params")
KINDS = ("datasets", "networks", "activations", "methods", "backends", "transports", "targets", "recipes", "calib")


def _stage_command(name: str, summary: str) -> None:
    """The commands that run stages differ only in the last one, so they are made alike."""

    def command(
        recipe: RecipeArgument = None,
        target: TargetOption = "local",
        device: DeviceOption = None,
        set_: SetOption = None,
        store: StoreOption = STORE,
        dry_run: DryRunOption = False,
        json_: JsonOption = False,
        quiet: QuietOption = False,
        verbose: VerboseOption = False,
        no_color: ColorOption = False,
        debug: DebugOption = False,
    ) -> None:
        if quiet and verbose:
            raise RecipeError(
                "--quiet and --verbose exclude each other", allowed="expected: at most one", fix="leave one out"
            )
        terminal = _terminal(no_color, verbosity=verbose - quiet)
        job = _job(name, recipe, target, device, set_ or [], store, terminal)
        if dry_run:
            _show_plan(job, name, terminal, json_)
        else:
            _run(job, name, terminal, json_)

    command.__doc__ = summary
    app.command(name)(command)


_stage_command("distill", "Train the teacher (or load it) and distill it into the student.")
_stage_command("export", "Export student and teacher to ONNX, checked against torch.")
_stage_command("compile", "Compile both for the target's backend.")
_stage_command("bench", "Measure both on the device, interleaved, and write the report.")
_stage_command("run", "Everything: from the teacher to a report of the student on the device.")


@app.command()
def plan(
    recipe: RecipeArgument = None, target: TargetOption = "local", set_: SetOption = None, store: StoreOption = STORE,
    json_: JsonOption = False, no_color: ColorOption = False, debug: DebugOption = False,
) -> None:  # fmt: skip
    """Show which stages a run would make and which it would reuse."""
    terminal = _terminal(no_color)
    _show_plan(_job("run", recipe, target, None, set_ or [], store, terminal), "run", terminal, json_)


@app.command()
def report(
    run: Annotated[str | None, typer.Argument(help="A run's id. Default: the newest run.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    store: StoreOption = STORE, json_: JsonOption = False, no_color: ColorOption = False, debug: DebugOption = False,
) -> None:  # fmt: skip
    """Write the report of a run again and print where it is."""
    from edgekd.artifact import Store

    document, path = _written(Store(store), run)
    if open_:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    print(document.to_json() if json_ else path)


@app.command()
def init(
    data: Annotated[Path | None, typer.Argument(help="Where your images are; found out when not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an edgekd.yaml that is there.")] = False,
    debug: DebugOption = False,
) -> None:
    """Write a commented edgekd.yaml for your data. Asks nothing."""
    from edgekd import starter
    from edgekd.recipe import DEFAULT_FILE

    if DEFAULT_FILE.exists() and not force:
        raise RecipeError(
            f"{DEFAULT_FILE} is there already",
            allowed="it is not overwritten unasked",
            fix="edit it, or: edgekd init --force",
        )
    written = starter.write(Path.cwd(), data)
    print("\n".join(str(path) for path in written))
    print("next: edgekd run", file=sys.stderr)


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help=f"One of: {', '.join(KINDS)}.")] = None,
    json_: JsonOption = False, no_color: ColorOption = False, debug: DebugOption = False,
) -> None:  # fmt: skip
    """List what there is: networks, activations, methods, backends, targets... with their options and defaults."""
    from edgekd import catalog

    if f"{kind}s" in KINDS:
        kind = f"{kind}s"
    if kind is not None and kind not in KINDS:
        raise unknown("KIND", kind, KINDS, noun="kind of thing", fix="see all: edgekd list")
    listed = {name: catalog.rows(name) for name in ([kind] if kind else KINDS)}
    if json_:
        print(json.dumps(listed, indent=2, default=str))
        return
    terminal = _terminal(no_color)
    for name, rows in listed.items():
        terminal.entries(name, [(row["name"], row["summary"], catalog.options_text(row)) for row in rows])


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from edgekd.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def doctor(
    device: Annotated[str, typer.Option("--device", metavar="URL", help="The machine to look at.")] = "local:",
    store: StoreOption = STORE, json_: JsonOption = False, no_color: ColorOption = False, debug: DebugOption = False,
) -> None:  # fmt: skip
    """Say what is there and what is missing, with the command that installs it."""
    from edgekd import catalog

    found = catalog.health(device, store)
    if json_:
        print(json.dumps(found, indent=2))
        return
    _terminal(no_color).table(
        ("what", "found", "to mend it"), [(row["what"], row["found"], row["fix"]) for row in found]
    )


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
    # A missed budget and a result that does not hold come after the report: that is the one document, and says so.
    if "--json" in arguments and not isinstance(error, BudgetMissed | ResultInvalid):
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


def _terminal(no_color: bool, verbosity: int = 0) -> Terminal:
    from edgekd.terminal import Terminal

    return Terminal(verbosity, color=not no_color)


def _job(
    command: str,
    recipe: str | None,
    target: str,
    device: str | None,
    overrides: list[str],
    store: Path,
    terminal: Terminal,
) -> Job:
    from datetime import UTC, datetime

    from edgekd import recipe as recipes
    from edgekd import target as targets
    from edgekd.artifact import Store
    from edgekd.stages import Job

    loaded = recipes.load(recipe, overrides)
    now = datetime.now(UTC)
    return Job(
        recipe=loaded,
        target=targets.load(target),
        store=Store(store),
        run_id=f"{now:%Y%m%d-%H%M%S}-{loaded.name}-{os.getpid()}",
        created=now.isoformat(timespec="seconds"),
        command=_command(command, recipe, target, device, overrides),
        device=device or "",
        on_progress=terminal.on_progress,
    )


def _command(command: str, recipe: str | None, target: str, device: str | None, overrides: list[str]) -> str:
    """The line that reproduces a run."""
    given = [*([recipe] if recipe else []), "--target", target, *(["--device", device] if device else [])]
    return shlex.join(["edgekd", command, *given, *(word for override in overrides for word in ("--set", override))])


@contextmanager
def _located(job: Job) -> Iterator[None]:
    """Errors about a key of the recipe say where it was given."""
    try:
        yield
    except EdgekdError as error:
        if error.key:
            job.recipe.origin.locate(error)
        raise


def _show_plan(job: Job, command: str, terminal: Terminal, json_: bool) -> None:
    from edgekd import pipeline

    with _located(job):
        planned = pipeline.plan(job, pipeline.LAST[command])
    if json_:
        print(json.dumps([{"stage": one.stage, "action": one.action, "key": one.key} for one in planned], indent=2))
        return
    meaning = {"reuse": "reuse", "run": "run", "unknown": "run, unless its new inputs turn out as before"}
    terminal.table(("stage", "action", "key"), [(one.stage, meaning[one.action], one.key[:12]) for one in planned])


def _run(job: Job, command: str, terminal: Terminal, json_: bool) -> None:
    from edgekd import pipeline

    with _located(job), terminal.working():
        pipeline.run(job, pipeline.LAST[command], terminal.on_stage)
    if not pipeline.is_main_process():
        return
    document, path = _written(job.store, job.run_id)
    if json_:
        print(document.to_json())
    else:
        _show(document, path, terminal)
    if pipeline.LAST[command] == "bench":
        _judge(document, path)


def _written(store: Store, run_id: str | None) -> tuple[Document, Path]:
    from edgekd import pipeline
    from edgekd import report as reports
    from edgekd.report.assemble import document_from_run

    record, artifacts = pipeline.recorded(store, run_id)
    document = document_from_run(record, artifacts)
    return document, reports.write(document, store.run_folder(record["run_id"]))


def _show(document: Document, path: Path, terminal: Terminal) -> None:
    from edgekd.report import tables

    ladder = tables.ladder(document)
    shown = [ladder.columns.index(name) for name in LADDER_COLUMNS]
    rows = [row.cells for row in ladder.rows if not row.reason]
    terminal.table(LADDER_COLUMNS, [[cells[column] for column in shown] for cells in rows])
    terminal.say("")
    terminal.say(f"{document.verdict.status}: {tables.headline(document)}")
    terminal.say(str(path))


def _judge(document: Document, path: Path) -> None:
    """Raises ResultInvalid or BudgetMissed: the report is there, and the exit code says how it ended."""
    verdict = document.verdict
    if verdict.status == "INVALID":
        raise ResultInvalid(
            f"the measurement does not hold: {verdict.reasons[0]}",
            allowed=f"reasons: {len(verdict.reasons)}, all in {path}",
            fix="quiet the machine and measure again: edgekd bench",
        )
    missed = [budget for budget in verdict.budgets if not budget.met]
    if missed:
        first = missed[0]
        raise BudgetMissed(
            f"budgets.{first.name} = {first.limit:g} is missed: {first.value:.4g}" if first.value is not None
            else f"budgets.{first.name} could not be measured",
            allowed=f"{len(missed)} of {len(verdict.budgets)} budgets missed, all in {path}",
            fix="train longer, choose a larger student, or relax the budget",
        )  # fmt: skip
