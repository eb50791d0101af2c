"""What a kit measured on a board that edgekd cannot reach, taken up by the run that made the kit."""

from __future__ import annotations

import json
from pathlib import Path

from edgekd import pipeline, recipe
from edgekd.artifact import Store
from edgekd.device import kit
from edgekd.errors import RecipeError, StoreError
from edgekd.stage_table import TABLE
from edgekd.stages import Job
from edgekd.target import Target


def job_of_kit(store: Store, results: Path, *, run_id: str, created: str, command: str) -> Job:
    """The job of the run that made a kit, with what the kit brought back in the place of a device.

    Raises RecipeError when no run in the store made the kit, StoreError when what that run made is not there any more.
    """
    wanted = kit.read(results)["kit"]
    for one in reversed(store.runs()):
        made = store.recorded(one)["artifacts"].get("kit")
        artifact = store.find("kit", made) if made else None
        if artifact is not None and artifact.result["id"] == wanted:
            break
    else:
        raise RecipeError(
            f"{results} is of a kit that no run in {store.root} has made",
            allowed="results belong to the store where their kit was made",
            fix="name that store: --store FOLDER",
        )
    record, _ = pipeline.recorded(store, one)
    job = Job(
        recipe=recipe.parse(json.dumps(record["recipe"]), name=str(store.root / "runs" / one / "run.json")),
        target=recipe.checked(Target, record["target"], fix=f"make the kit again: {record['command']}"),
        store=store, run_id=run_id, created=created, command=command, device=f"kit:{results.resolve()}",
    )  # fmt: skip
    measuring = {stage.name for stage in TABLE if stage.measures}
    if gone := [
        one.stage for one in pipeline.plan(job, "bench") if one.action != "reuse" and one.stage not in measuring
    ]:
        raise StoreError(
            f"{store.root}: {gone[0]} would be made anew, so {results} is not of it",
            allowed="the data or edgekd itself has changed since the kit was made",
            fix=f"make the kit again: {record['command']}",
        )
    return job
