"""The commands that run stages."""

from __future__ import annotations

import inspect
import json
import os
import shlex
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.cli.asked import Asked, located
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
from edgekd.cli.outcome import judge, show, show_kit, written
from edgekd.errors import RecipeError

if TYPE_CHECKING:
    from edgekd.stages import Job
    from edgekd.terminal import Terminal


# Commands that end with one of these stages exit with the verdict on what they made.
JUDGED = ("quantize", "build-student", "bench")
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
        if name == "compile" and recipe is not None and recipe.lower().endswith(".onnx"):
            from edgekd import target as targets

            _check_has_no_recipe(set_, dry_run)
            where = targets.load(asked.target_at(place), backend)
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
        show(document, path, terminal)
    if last == "kit":
        show_kit(made["kit"], terminal)
    if last in JUDGED:
        judge(document, path)


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
