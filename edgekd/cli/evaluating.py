"""The command that evaluates the exported networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from edgekd.cli.asked import Asked
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
from edgekd.cli.running import run_job


def eval_(
    recipe: RecipeArgument = None,
    corruptions: Annotated[
        bool, typer.Option("--corruptions", help="On corrupted test images too, 13 kinds in 5 severities.")
    ] = False,
    target: TargetOption = "local", set_: SetOption = None, store: StoreOption = STORE, json_: JsonOption = False,
    no_color: ColorOption = False, debug: DebugOption = False,
) -> None:  # fmt: skip
    """Score teacher and student, as exported, on the test images; with --corruptions on bad ones too."""
    terminal = terminal_of(no_color)
    asked = Asked("eval", recipe, target, overrides=tuple(set_ or ()), store=store)
    job = asked.job(terminal)
    if corruptions and job.recipe.corruptions is None:
        job = replace(asked, overrides=(*asked.overrides, "corruptions={}")).job(terminal)
    run_job(job, "eval", terminal, json_)
