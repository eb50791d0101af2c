"""The stage table, and what is done with it: plan, run, resume.

A stage runs when the store does not hold what it would make. The key of an artifact is made of the stage, its version,
the part of the recipe that it reads and the digests of its inputs, so a changed option reruns exactly the stages that
depend on it, and a stage that makes the same bytes as before stops the rerun there.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from edgekd import __version__, stages
from edgekd.artifact import Artifact, Store, key_of, sha256_of, write_synced
from edgekd.errors import CheckpointError, RecipeError, StoreError, unknown
from edgekd.stages import Inputs, Job


@dataclass(frozen=True)
class Stage:
    """One row of the table. `spec` is what of recipe and target would make the artifact wrong if it changed."""

    name: str
    make: Callable[[Job, Inputs, Path, Path], Mapping[str, Any]]
    spec: Callable[[Job], Mapping[str, Any]]
    inputs: tuple[str, ...] = ()
    version: int = 1
    wanted: Callable[[Job], bool] = lambda job: True
    measures: bool = False  # a measurement is never reused: its key holds the run
    trains: bool = False  # runs in every process of a distributed run


def _network(job: Job, part: str) -> dict[str, Any]:
    return {part: getattr(job.recipe, part).model_dump(mode="json", exclude={"checkpoint"}), **_learning(job)}


def _learning(job: Job) -> dict[str, Any]:
    return {"data": job.recipe.data.model_dump(mode="json"), "seed": job.recipe.seed}


def _teacher(job: Job) -> dict[str, Any]:
    spec = job.recipe.teacher
    if spec.checkpoint is None:
        return _network(job, "teacher")
    # A teacher that is only loaded depends neither on how it would be trained nor on the seed.
    given = {"teacher": spec.model_dump(mode="json", exclude={"checkpoint", "train"}), "data": job.recipe.data.model_dump(mode="json")}
    return {**given, "checkpoint_sha256": _checkpoint(spec.checkpoint)}


def _scratch(job: Job) -> dict[str, Any]:
    return {**_network(job, "student"), "train": job.recipe.distill.train.model_dump(mode="json")}


def _student(job: Job) -> dict[str, Any]:
    # Where the teacher's logits come from does not change the student.
    distill = job.recipe.distill.model_dump(mode="json", exclude={"scratch", "cache_teacher"})
    return {**_network(job, "student"), "distill": distill}


def _onnx(job: Job, subject: str) -> dict[str, Any]:
    spec = job.recipe.export
    return {**spec.model_dump(mode="json"), "opset": spec.opset or job.target.opset, "form": job.form(subject)}


def _engine(job: Job) -> dict[str, Any]:
    return {"backend": job.choice.name, "options": job.choice.options, "threads": job.target.threads}


def _bench(job: Job) -> dict[str, Any]:
    return {"run": job.run_id, **job.recipe.benchmark.model_dump(mode="json")}


def _checkpoint(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_file():
        raise CheckpointError(f"teacher.checkpoint = {path} does not exist", fix="correct the path, or drop it to train the teacher here")
    return sha256_of(path)


TABLE: tuple[Stage, ...] = (
    Stage("teacher", stages.teacher, _teacher, trains=True),
    Stage("scratch", stages.scratch, _scratch, wanted=lambda job: job.recipe.distill.scratch, trains=True),
    Stage("student", stages.student, _student, ("teacher",), trains=True),
    *(
        Stage(f"onnx-{subject}", functools.partial(stages.onnx, subject), functools.partial(_onnx, subject=subject), (subject,))
        for subject in ("teacher", "student")
    ),
    *(
        Stage(f"engine-{subject}", functools.partial(stages.engine, subject), _engine, (f"onnx-{subject}",))
        for subject in ("teacher", "student")
    ),
    Stage("bench", stages.bench, _bench, ("engine-student", "engine-teacher"), measures=True),
)
# The last stage that each command of the command line needs; it runs that one and all above it.
LAST = {"distill": "student", "export": "onnx-student", "compile": "engine-student", "bench": "bench", "run": "bench"}

Action = Literal["reuse", "run", "unknown"]


@dataclass(frozen=True)
class StageEvent:
    """What happens to a stage: `reuse`, `wait` for another run that makes the same, `run`, and in the end `done`."""

    stage: str
    number: int
    total: int
    what: Literal["reuse", "wait", "run", "done"]


OnStage = Callable[[StageEvent], None]


@dataclass(frozen=True)
class Planned:
    """What would happen to a stage: `reuse` what the store holds, `run`, or `unknown` until its inputs are made."""

    stage: str
    action: Action
    key: str = ""
    artifact: Artifact | None = None


def needed(job: Job, last: str) -> list[Stage]:
    """The stages up to `last`, in order."""
    names = [stage.name for stage in TABLE]
    return [stage for stage in TABLE[: names.index(last) + 1] if stage.wanted(job)]


def plan(job: Job, last: str) -> list[Planned]:
    """What `run` would do, without doing it and without reading more than hashes. Raises what a run would raise early."""
    found: dict[str, Planned] = {}
    for stage in needed(job, last):
        artifacts = [found[name].artifact for name in stage.inputs]
        if all(artifacts):
            key = _key(job, stage, {name: found[name].artifact for name in stage.inputs})  # type: ignore[misc]
            artifact = None if stage.measures else job.store.find(stage.name, key)
            found[stage.name] = Planned(stage.name, "reuse" if artifact else "run", key, artifact)
        else:
            found[stage.name] = Planned(stage.name, "run" if stage.measures else "unknown")
    return list(found.values())


def check(job: Job) -> None:
    """Find what would fail late before anything is trained: method, networks, backend. Raises what they raise."""
    job.backend.require()
    job.method()
    for subject in ("teacher", "student"):
        job.build(subject)


def run(job: Job, last: str, on_stage: OnStage = lambda event: None) -> dict[str, Artifact]:
    """Bring every stage up to `last` into the store, and return the artifacts by stage.

    In a distributed run every process trains; the first one alone stores, exports and measures.
    """
    main = is_main_process()
    wanted = [stage for stage in needed(job, last) if main or stage.trains]
    if any(planned.action != "reuse" for planned in plan(job, last) if planned.stage != "bench"):
        check(job)
    made: dict[str, Artifact] = {}
    for number, stage in enumerate(wanted, start=1):
        inputs = {name: made[name] for name in stage.inputs}
        key = _key(job, stage, inputs)
        event = functools.partial(StageEvent, stage.name, number, len(wanted))
        artifact = job.store.find(stage.name, key)
        if artifact is not None:
            on_stage(event("reuse"))
        elif main:
            with job.store.locked(key, lambda event=event: on_stage(event("wait"))):  # type: ignore[misc]
                artifact = job.store.find(stage.name, key)  # made by another run while this one waited
                if artifact is None:
                    on_stage(event("run"))
                    artifact = _make(job, stage, key, inputs)
        else:
            _take_part(job, stage, key, inputs)
            artifact = job.store.find(stage.name, key)
        assert artifact is not None
        made[stage.name] = artifact
        on_stage(event("done"))
        if main:
            record(job, made)
    return made


def is_main_process() -> bool:
    """Whether this process stores and prints: every one but the helpers of a distributed run."""
    return os.environ.get("RANK", "0") == "0"


def record(job: Job, made: Mapping[str, Artifact]) -> None:
    """Write what the run has made so far to its folder: a report can be made from it at any time."""
    content = {
        "schema_version": 1,
        "run_id": job.run_id,
        "created": job.created,
        "command": job.command,
        "recipe": job.recipe.model_dump(mode="json"),
        "target": job.target.model_dump(mode="json"),
        "artifacts": {name: artifact.key for name, artifact in made.items()},
    }
    write_synced(job.store.run_folder(job.run_id) / "run.json", json.dumps(content, indent=1))


def recorded(store: Store, run_id: str | None = None) -> tuple[dict[str, Any], dict[str, Artifact]]:
    """What a run recorded, and its artifacts, verified; None is the newest run. Raises RecipeError, StoreError."""
    runs = sorted(folder.parent.name for folder in (store.root / "runs").glob("*/run.json"))
    if not runs:
        raise RecipeError(f"there is no run in {store.root}", fix="make one: edgekd run digits")
    if run_id is not None and run_id not in runs:
        raise unknown("run", run_id, runs, noun="run", fix=f"see: ls {store.root / 'runs'}")
    content = json.loads((store.root / "runs" / (run_id or runs[-1]) / "run.json").read_text(encoding="utf-8"))
    artifacts = {}
    for stage, key in content["artifacts"].items():
        found = store.find(stage, key)
        if found is None:
            raise StoreError(f"the artifact {stage}/{key[:12]} of run {content['run_id']} is gone", fix="run it again")
        artifacts[stage] = found
    return content, artifacts


def _key(job: Job, stage: Stage, inputs: Inputs) -> str:
    digests = {name: artifact.digest for name, artifact in inputs.items()}
    return key_of(stage.name, stage.version, stage.spec(job), digests, {"data": job.fingerprint})


def _make(job: Job, stage: Stage, key: str, inputs: Inputs) -> Artifact:
    started = time.monotonic()
    work = job.store.work(key)
    artifact = job.store.publish(
        stage.name,
        key,
        fill=lambda out: stage.make(job, inputs, out, work),
        about=lambda: {**_about(job, stage, inputs), "seconds": round(time.monotonic() - started, 3)},
    )
    job.store.clean_work(key)
    if stage.trains:
        _wait_for_all()
    return artifact


def _take_part(job: Job, stage: Stage, key: str, inputs: Inputs) -> None:
    """Train beside the first process; what it stores is the artifact."""
    with tempfile.TemporaryDirectory() as folder:
        stage.make(job, inputs, Path(folder), job.store.work(key))
    _wait_for_all()


def _wait_for_all() -> None:
    if "RANK" in os.environ:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def _about(job: Job, stage: Stage, inputs: Inputs) -> dict[str, Any]:
    return {
        "spec": stage.spec(job),
        "inputs": {name: artifact.digest for name, artifact in inputs.items()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv[1:],
        "host": {"python": platform.python_version(), "platform": platform.platform(), "git": _git()},
        "versions": {"edgekd": __version__, **{name: _version(name) for name in RECORDED if _version(name)}},
    }


RECORDED = ("torch", "accelerate", "numpy", "onnx", "onnxscript", "onnxruntime")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _git() -> str:
    """The commit of the user's project, so that a result can be found again; empty outside a checkout."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()
