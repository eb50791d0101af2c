"""The commands that run stages."""

from __future__ import annotations

import inspect
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.cli.onnx_files import compile_file
from edgekd.cli.options import (
    STORE,
    BackendOption,
    ColorOption,
    DebugOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    LoadgenOption,
    LockClocksOption,
    QuietOption,
    RecipeArgument,
    RunIdOption,
    SetOption,
    StoreOption,
    TargetOption,
    VerboseOption,
    WhereOption,
    terminal_of,
)
from edgekd.errors import BudgetMissed, EdgekdError, RecipeError, ResultInvalid
from edgekd.kit import FOLDER

if TYPE_CHECKING:
    from edgekd.artifact import Artifact, Store
    from edgekd.inventory import Place
    from edgekd.report import BoardsDocument, Document
    from edgekd.stages import Job
    from edgekd.target import Target
    from edgekd.terminal import Terminal


DEFAULT_TARGET = "local"
# Commands that end with one of these stages exit with the verdict on what they made.
JUDGED = ("quantize", "build-student", "bench")
# What of the report's ladder fits on a terminal of 80 columns.
LADDER_COLUMNS = (0, 1, 2, 3, 6, 7)  # rung, score, interval, to teacher, size, params


# Options of those commands alone that measure on a device.
MEASURING = ("lock_clocks", "loadgen")
STAGE_COMMANDS = {
    "distill": "Train the teacher (or load it) and distill it into the student.",
    "export": "Export student and teacher to ONNX, checked against torch.",
    "quantize": "Quantize the student as the recipe says, and account for what it costs.",
    "compile": "Compile both for the target's backend.",
    "bench": "Measure both on the device, interleaved, and write the report.",
    "run": "Everything: from the teacher to a report of the student on the device.",
}


def stage_command(name: str, summary: str) -> Callable[..., None]:
    """The commands that run stages differ only in the last one, so they are made alike."""

    def command(
        recipe: RecipeArgument = None,
        target: WhereOption = None,
        device: DeviceOption = None,
        backend: BackendOption = None,
        set_: SetOption = None,
        store: StoreOption = STORE,
        lock_clocks: LockClocksOption = False,
        loadgen: LoadgenOption = False,
        dry_run: DryRunOption = False,
        json_: JsonOption = False,
        quiet: QuietOption = False,
        verbose: VerboseOption = False,
        no_color: ColorOption = False,
        debug: DebugOption = False,
        run_id: RunIdOption = None,
    ) -> None:
        from edgekd import inventory

        if quiet and verbose:
            raise RecipeError(
                "--quiet and --verbose exclude each other", allowed="expected: at most one", fix="leave one out"
            )
        terminal = terminal_of(no_color, verbosity=verbose - quiet)
        places = inventory.places(device or [])
        flags = {"lock_clocks": lock_clocks, "loadgen": loadgen}
        overrides = (*(set_ or ()), *(f"benchmark.{flag}=true" for flag, given in flags.items() if given))
        asked = Asked(name, recipe, target, tuple(device or ()), overrides, store, backend)
        each = inventory.places(device or [], repeated=True)
        spread = len(each) > 1 and name in ("bench", "run") and asked.spreads
        if len(places) > 1 and not spread:
            from edgekd.cli import boards

            jobs = boards.jobs_at(places, asked, terminal)
            return _show_plans(jobs, name, terminal, json_) if dry_run else boards.run(jobs, asked, terminal, json_)
        place = places[0] if places else None
        if name == "compile" and recipe is not None and recipe.endswith(".onnx"):
            _check_has_no_recipe(set_, dry_run)
            where = target_of(asked.target_at(place), backend)
            return compile_file(Path(recipe), where, place.url if place else None, store, terminal, json_)
        if spread:
            from edgekd.cli import boards

            job = boards.spread_over(each, asked, terminal)
        else:
            job = asked.job(terminal, place, run_id)
        if name == "quantize":
            _check_quantizes(job)
        if dry_run:
            _show_plan(job, name, terminal, json_)
        else:
            run_job(job, name, terminal, json_)

    command.__doc__ = summary
    whole = inspect.signature(command, eval_str=True)
    kept = [one for one in whole.parameters.values() if one.name not in MEASURING or name in ("bench", "run")]
    command.__signature__ = whole.replace(parameters=kept)  # type: ignore[attr-defined]
    return command


def plan(
    recipe: RecipeArgument = None, target: TargetOption = "local", set_: SetOption = None, store: StoreOption = STORE,
    json_: JsonOption = False, no_color: ColorOption = False, debug: DebugOption = False,
) -> None:  # fmt: skip
    """Show which stages a run would make and which it would reuse."""
    terminal = terminal_of(no_color)
    job = Asked("run", recipe, target, overrides=tuple(set_ or ()), store=store).job(terminal)
    _show_plan(job, "run", terminal, json_)


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
        from edgekd.artifact import Store
        from edgekd.stages import Job

        loaded, now, target = recipes.load(self.recipe, self.overrides), datetime.now(UTC), self.target_at(place)
        return Job(
            recipe=loaded,
            target=target_of(target, self.backend),
            store=Store(self.store),
            run_id=run_id or f"{now:%Y%m%d-%H%M%S}-{loaded.name}-{os.getpid()}",
            created=now.isoformat(timespec="seconds"),
            command=shlex.join(["edgekd", self.command, *self.words(self.devices, target)]),
            device=place.url if place else "",
            on_progress=terminal.on_progress,
        )


def target_of(name: str, backend: str | None) -> Target:
    """The target of that name, compiled for by `backend` if one is named."""
    from edgekd import target as targets

    loaded = targets.load(name)
    return loaded if backend is None else targets.with_backend(loaded, backend)


def _check_has_no_recipe(overrides: list[str] | None, dry_run: bool) -> None:
    if overrides or dry_run:
        raise RecipeError(
            f"edgekd compile MODEL.onnx takes no {'--set' if overrides else '--dry-run'}: there is no recipe to it",
            allowed="with an ONNX file: --target, --backend, --device, --store, --json",
            fix="leave it out; a backend's options go like this: --backend '{tvm: {tuning: quick}}'",
        )


def _check_quantizes(job: Job) -> None:
    if job.recipe.quantize.method == "none":
        raise RecipeError(
            f"the recipe {job.recipe.name} asks for no quantization: quantize.method = none",
            allowed="see: edgekd list quantizers",
            fix="--set quantize.method=ptq",
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


def _show_plans(jobs: Mapping[str, Job], command: str, terminal: Terminal, json_: bool) -> None:
    """The plan of each device; as JSON, by its name."""
    if json_:
        print(json.dumps({name: _planned(job, command) for name, job in jobs.items()}, indent=2))
        return
    for name, job in jobs.items():
        terminal.say(f"{name}, {job.target.name}:")
        _show_plan(job, command, terminal, json_)


def _planned(job: Job, command: str) -> list[dict[str, str]]:
    from edgekd import pipeline
    from edgekd.stage_table import last_stage

    with located(job):
        planned = pipeline.plan(job, last_stage(command, job))
    return [{"stage": one.stage, "action": one.action, "key": one.key} for one in planned]


def _show_plan(job: Job, command: str, terminal: Terminal, json_: bool) -> None:
    planned = _planned(job, command)
    if json_:
        print(json.dumps(planned, indent=2))
        return
    meaning = {"reuse": "reuse", "run": "run", "unknown": "run, unless its new inputs turn out as before"}
    rows = [(one["stage"], meaning[one["action"]], one["key"][:12]) for one in planned]
    terminal.table(("stage", "action", "key"), rows)


def run_job(job: Job, command: str, terminal: Terminal, json_: bool) -> None:
    """Bring the stages of a command into the store, and show what they found."""
    from edgekd import pipeline
    from edgekd.report import Document
    from edgekd.stage_table import last_stage

    last = last_stage(command, job)
    with located(job), terminal.working():
        made = pipeline.run(job, last, terminal.on_stage)
    if not pipeline.is_main_process():
        return
    document, path = written(job.store, job.run_id)
    assert isinstance(document, Document)
    if json_:
        print(document.to_json())
    else:
        _show(document, path, terminal)
    if last == "kit":
        _show_kit(made["kit"], terminal)
    if last in JUDGED:
        _judge(document, path)


def import_(
    results: Annotated[Path, typer.Argument(metavar="RESULTS.json", help="What a kit's run.py wrote on the board.")],
    store: StoreOption = STORE, json_: JsonOption = False, no_color: ColorOption = False, debug: DebugOption = False,
) -> None:  # fmt: skip
    """Write the report of what a kit measured on a board that edgekd cannot reach."""
    from edgekd import importing
    from edgekd.artifact import Store

    now = datetime.now(UTC)
    job = importing.job_of_kit(
        Store(store), results, run_id=f"{now:%Y%m%d-%H%M%S}-import-{os.getpid()}",
        created=now.isoformat(timespec="seconds"), command=shlex.join(["edgekd", "import", str(results)]),
    )  # fmt: skip
    terminal = terminal_of(no_color)
    job.on_progress = terminal.on_progress
    run_job(job, "bench", terminal, json_)


def _show_kit(made: Artifact, terminal: Terminal) -> None:
    """Where it is, and what is done with it."""
    from edgekd.stages import ARCHIVE

    file = made.file(ARCHIVE)
    terminal.say(f"kit for the board: {file} ({made.result['size_bytes'] / 1e6:.1f} MB)")
    terminal.say(f"  on the board:  tar xzf {ARCHIVE} && python3 {FOLDER}/run.py")
    terminal.say("  back here:     edgekd import results.json")


def written(store: Store, run_id: str | None) -> tuple[Document | BoardsDocument, Path]:
    """The report of a run, None is the newest, and where it was written."""
    from edgekd import pipeline
    from edgekd import report as reports
    from edgekd.report import boards
    from edgekd.report.assemble import document_from_run

    record, artifacts = pipeline.recorded(store, run_id)
    document: Document | BoardsDocument
    if "boards" in record:
        measured = [board for board in record["boards"] if not board["error"]]
        own = {board["name"]: document_from_run(*pipeline.recorded(store, board["run_id"])) for board in measured}
        document = boards.document_from_boards(record, own)
    else:
        document = document_from_run(record, artifacts)
    return document, reports.write(document, store.run_folder(record["run_id"]))


def _show(document: Document, path: Path, terminal: Terminal) -> None:
    from edgekd.report import Absent, network_tables, tables

    ladder = tables.ladder(document)
    lines = [ladder.columns, *(row.cells for row in ladder.rows if not row.reason)]
    columns, *rows = ([cells[at] for at in LADDER_COLUMNS] for cells in lines)
    terminal.table(columns, rows)
    for table in (network_tables.boards(document), network_tables.heard(document)):
        if not isinstance(table, Absent):
            terminal.say("")
            terminal.table(table.columns, [row.cells for row in table.rows])
    terminal.say("")
    for name, engine in document.engines.items():
        for alarm in engine.alarms:
            terminal.say(f"alarm: {name}: {alarm}")
    terminal.say(f"{document.verdict.status_text}: {tables.headline(document)}")
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
    missed = [budget for budget in verdict.budgets if budget.met is False]
    if missed:
        first = missed[0]
        raise BudgetMissed(
            f"budgets.{first.name} = {first.limit:g} is missed: {first.value:.4g}",
            allowed=f"{len(missed)} of {len(verdict.budgets)} budgets missed, all in {path}",
            fix="train longer, choose a larger student or another quantize.method, or relax the budget",
        )
