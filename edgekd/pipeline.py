"""What is done with the stage table: plan, run, resume.

A stage runs when the store does not hold what it would make. The key of an artifact is made of the stage, its version,
the part of the recipe that it reads and the digests of its inputs, so a changed option reruns exactly the stages that
depend on it, and a stage that makes the same bytes as before stops the rerun there.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from edgekd import __version__, preflight, stages
from edgekd.artifact import Artifact, Store, key_of
from edgekd.data import calibration
from edgekd.errors import RecipeError, StoreError, unknown
from edgekd.stage_table import Stage, needed
from edgekd.stages import Inputs, Job

_log = logging.getLogger(__name__)
# What may change a result, listed in every manifest.
RECORDED = ("torch", "accelerate", "numpy", "onnx", "onnxscript", "onnxruntime")


Action = Literal["reuse", "run", "unknown"]
What = Literal["reuse", "wait", "run", "done"]


@dataclass(frozen=True)
class StageEvent:
    """What happens to a stage: `reuse`, `wait` for another run that makes the same, `run`, and in the end `done`."""

    stage: str
    number: int
    total: int
    what: What


OnStage = Callable[[StageEvent], None]


@dataclass(frozen=True)
class Planned:
    """What would happen to a stage: `reuse` what the store holds, `run`, or `unknown` until its inputs are made."""

    stage: str
    action: Action
    key: str = ""
    artifact: Artifact | None = None


def plan(job: Job, last: str) -> list[Planned]:
    """What `run` would do, without doing it and without reading more than hashes. Raises what a run raises early."""
    found: dict[str, Planned] = {}
    for stage in needed(job, last):
        inputs = {name: found[name].artifact for name in stage.inputs if name in found}
        if stage.measures:
            preflight.check_device(job)
        if all(inputs.values()):
            key = _key(job, stage, inputs)  # type: ignore[arg-type]
            artifact = None if stage.measures else job.store.find(stage.name, key)
            found[stage.name] = Planned(stage.name, "reuse" if artifact else "run", key, artifact)
        else:
            found[stage.name] = Planned(stage.name, "run" if stage.measures else "unknown")
    return list(found.values())


def run(job: Job, last: str, on_stage: OnStage = lambda event: None) -> dict[str, Artifact]:
    """Bring every stage up to `last` into the store, and return the artifacts by stage.

    In a distributed run every process trains; the first one alone stores, exports and measures.
    """
    main = is_main_process()
    wanted = [stage for stage in needed(job, last) if main or stage.trains]
    preflight.check(job, [planned.stage for planned in plan(job, last) if planned.action != "reuse"])
    made: dict[str, Artifact] = {}
    for number, stage in enumerate(wanted, start=1):
        tell = partial(_tell, on_stage, stage.name, number, len(wanted))
        made[stage.name] = _obtained(job, stage, {name: made[name] for name in stage.inputs if name in made}, tell)
        tell("done")
        if main:
            job.store.record(job.run_id, _record(job, made))
    _disconnect()
    return made


def calibration_study(job: Job, on_stage: OnStage = lambda event: None) -> list[dict[str, Any]]:
    """How much the size and the choice of a calibration set matter for this student, see `quantize.calibration_study`.

    Ranges are chosen as `quantize.calibrate` says; where that is auto or not given, by minmax.
    """
    from edgekd.quantize import calibration_study as studies

    model = run(job, "onnx-student", on_stage)["onnx-student"].file(stages.MODEL)
    options, dataset = job.recipe.quantize.options, job.dataset

    def drawn(n: int, seed: int) -> Any:
        return dataset.normalize(calibration.of(dataset, None, {}, n=n, seed=seed).samples.images)

    method = options.get("calibrate", "auto")
    return studies.study(
        model, drawn, dataset.normalize(dataset.val.images), dataset.judge("val"),
        method="minmax" if method == "auto" else method, percentile=options.get("percentile", 99.99),
        on_progress=job.on_progress,
    )  # fmt: skip


def _obtained(job: Job, stage: Stage, inputs: Inputs, tell: Callable[[What], None]) -> Artifact:
    """The stage's artifact: from the store, made here, or in a helper process made by the first one."""
    key = _key(job, stage, inputs)
    _log.info("%s %s", stage.name, key)
    artifact = job.store.find(stage.name, key)
    if artifact is not None and not _shared(stage):
        tell("reuse")
    elif is_main_process():
        with job.store.locked(key, on_wait=lambda: tell("wait")):
            artifact = job.store.find(stage.name, key)  # made by another run while this one waited
            tell("reuse" if artifact else "run")
            _agreed(stage, artifact is not None)
            artifact = artifact or _make(job, stage, key, inputs)
    else:
        if not _agreed(stage):
            _take_part(job, stage, key, inputs)
        artifact = job.store.find(stage.name, key)
    assert artifact is not None
    return artifact


def _tell(on_stage: OnStage, name: str, number: int, total: int, what: What) -> None:
    on_stage(StageEvent(name, number, total, what))


def is_main_process() -> bool:
    """Whether this process stores and prints: every one but the helpers of a distributed run."""
    return os.environ.get("RANK", "0") == "0"


def recorded(store: Store, run_id: str | None = None) -> tuple[dict[str, Any], dict[str, Artifact]]:
    """What a run recorded, and its artifacts, verified; None is the newest run. Raises RecipeError, StoreError.

    A run on several boards records `boards`, each with the id of its own run, and has no artifacts of its own.
    """
    runs = store.runs()
    if run_id is None and not runs:
        raise RecipeError(
            f"there is no run in {store.root}",
            allowed="a run leaves its record there",
            fix="make one: edgekd run digits",
        )
    if run_id is not None and not store.has_run(run_id):
        raise unknown("run", run_id, runs, noun="run", fix=f"see: ls {store.root / 'runs'}")
    content = store.recorded(run_id or runs[-1])
    artifacts = {}
    for stage, key in content.get("artifacts", {}).items():
        found = store.find(stage, key)
        if found is None:
            raise StoreError(
                f"{store.root}: the artifact {stage}/{key[:12]} is gone",
                allowed=f"the run {content['run_id']} needs it",
                fix=f"make it again: {content['command']}",
            )
        artifacts[stage] = found
    return content, artifacts


def _record(job: Job, made: Mapping[str, Artifact]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "run_id": job.run_id,
        "created": job.created,
        "command": job.command,
        "recipe": job.recipe.model_dump(mode="json"),
        "target": job.target.model_dump(mode="json"),
        "artifacts": {name: artifact.key for name, artifact in made.items()},
    }


def _key(job: Job, stage: Stage, inputs: Inputs) -> str:
    digests = {"data": job.fingerprint, **{name: artifact.digest for name, artifact in inputs.items()}}
    return key_of(stage.name, stage.version, stage.spec(job), digests)


def _make(job: Job, stage: Stage, key: str, inputs: Inputs) -> Artifact:
    started = time.monotonic()
    work = job.store.work(key)
    _log.info("%s: %s, scratch in %s", stage.name, json.dumps(stage.spec(job), default=str), work)
    artifact = job.store.publish(
        stage.name,
        key,
        fill=lambda out: stage.make(job, inputs, out, work),
        about=lambda: {**_about(job, stage, inputs), "seconds": round(time.monotonic() - started, 3)},
    )
    job.store.clean_work(key)
    _log.info("%s: published as %s", stage.name, artifact.folder)
    if stage.trains:
        _wait_for_all()
    return artifact


def _take_part(job: Job, stage: Stage, key: str, inputs: Inputs) -> None:
    """Train beside the first process; what it stores is the artifact."""
    with tempfile.TemporaryDirectory() as folder:
        stage.make(job, inputs, Path(folder), job.store.work(key))
    _wait_for_all()


def _shared(stage: Stage) -> bool:
    """Whether several processes make this stage together."""
    return stage.trains and "RANK" in os.environ


def _agreed(stage: Stage, found: bool = False) -> bool:
    """What the first process found, told to all: a store that each asked alone could answer them differently."""
    if not _shared(stage):
        return found
    from accelerate.utils import broadcast_object_list

    from edgekd import distill

    distill.processes()
    answer: list[bool] = broadcast_object_list([found])
    return answer[0]


def _disconnect() -> None:
    """Leave the other processes: one that ends while it is connected may be ended with an error."""
    if "RANK" in os.environ:
        from edgekd import distill

        distill.processes().destroy_process_group()


def _wait_for_all() -> None:
    if "RANK" in os.environ:
        from edgekd import distill

        distill.processes().wait_for_everyone()


def _about(job: Job, stage: Stage, inputs: Inputs) -> dict[str, Any]:
    return {
        "spec": stage.spec(job),
        "inputs": {name: artifact.digest for name, artifact in inputs.items()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv[1:],
        "host": {"python": platform.python_version(), "platform": platform.platform(), "git": _git()},
        "versions": {"edgekd": __version__, **{name: _version(name) for name in RECORDED if _version(name)}},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def _git() -> str:
    """The commit of the user's project, so that a result can be found again; empty outside a checkout."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()
