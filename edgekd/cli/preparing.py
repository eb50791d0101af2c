"""The commands that prepare a project: a recipe, a calibration set."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.asked import Asked, located
from edgekd.cli.options import (
    STORE,
    ColorOption,
    DebugOption,
    JsonOption,
    RecipeArgument,
    SetOption,
    StoreOption,
    TargetOption,
    terminal_of,
)
from edgekd.errors import RecipeError


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


def calib(
    recipe: RecipeArgument = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: calib-SOURCE-N-SEED.yaml here.")] = None,
    images: Annotated[int, typer.Option("--images", "-n", min=1, help="How many, of all classes.")] = 512,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which images.")] = 0,
    study: Annotated[bool, typer.Option("--study", help="Quantize with sets of several sizes and seeds.")] = False,
    target: TargetOption = "local", set_: SetOption = None, store: StoreOption = STORE, json_: JsonOption = False,
    no_color: ColorOption = False, debug: DebugOption = False,
) -> None:  # fmt: skip
    """Write a calibration set of the recipe's data; or show how much its size and its images matter."""
    terminal = terminal_of(no_color)
    # An export is what a study records.
    job = Asked("export", recipe, target, overrides=tuple(set_ or ()), store=store).job(terminal)
    if not study:
        from edgekd.data import calibration

        with located(job):
            data = job.recipe.data
            made = calibration.make(data.source, data.options, data.task, n=images, seed=seed)
        file = out or Path(f"calib-{job.recipe.data.source}-{images}-{seed}.yaml")
        calibration.save(made, file)
        print(file)
        print(f"next: edgekd quantize --set quantize.method=ptq --set quantize.calibration={file}", file=sys.stderr)
        return
    from edgekd import pipeline

    with located(job), terminal.working():
        rows = pipeline.calibration_study(job, terminal.on_stage)
    if json_:
        print(json.dumps(rows, indent=2))
        return
    terminal.table(
        ("images", "seed", f"{job.task.metric.label} of the validation split", "SQNR of the logits"),
        [
            (
                str(row["images"]),
                str(row["seed"]),
                job.task.metric.text(row["score"]),
                f"{row['logits_sqnr_db']:.1f} dB",
            )
            for row in rows
        ],
    )
