"""The stage table, and what is done with it: plan, run, resume.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal

from edgekd import __version__, preflight, stages
from edgekd.artifact import Artifact, Store, by_content, key_of, sha256_of
from edgekd.data import calibration
from edgekd.errors import CheckpointError, RecipeError, StoreError, shown, unknown
from edgekd.preflight import SUBJECTS
from edgekd.stages import Inputs, Job

_log = logging.getLogger(__name__)
# What may change a result, listed in every manifest.
RECORDED = ("torch", "accelerate", "numpy", "onnx", "onnxscript", "onnxruntime")


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
    spec, data = getattr(job.recipe, part), job.recipe.data
    own = {"source_sha256": source} if (source := _source_sha256(spec.network)) else {}
    return {
        part: by_content(spec.model_dump(exclude={"checkpoint"})),
        "seed": job.recipe.seed,
        # The source's options are in the data's fingerprint, except for where its files lie.
        "data": data.model_dump(mode="json", exclude=set(data.options)),
        **own,
    }


def _source_sha256(network: str) -> str:
    """Of the file that defines a `module:callable`, found without importing it; empty for other networks."""
    module, colon, _ = network.partition(":")
    places: Sequence[str] | None = [*sys.path, os.getcwd()]
    spec = None
    for depth in range(1, module.count(".") + 2 if colon else 0):
        spec = PathFinder.find_spec(".".join(module.split(".")[:depth]), places)
        places = spec.submodule_search_locations if spec else []
    return sha256_of(Path(spec.origin)) if spec and spec.has_location and spec.origin else ""


def _teacher(job: Job) -> dict[str, Any]:
    spec = job.recipe.teacher
    if spec.checkpoint is None:
        return _network(job, "teacher")
    # A teacher that is only loaded depends neither on how it would be trained nor on the seed.
    given = by_content(spec.model_dump(exclude={"checkpoint", "train"}))
    return {
        **_network(job, "teacher"),
        "teacher": given,
        "seed": None,
        "checkpoint_sha256": _checkpoint(spec.checkpoint),
    }


def _scratch(job: Job) -> dict[str, Any]:
    return {**_network(job, "student"), "train": job.recipe.distill.train.model_dump(mode="json")}


def _student(job: Job) -> dict[str, Any]:
    # Where the teacher's logits come from does not change the student.
    distill = by_content(job.recipe.distill.model_dump(exclude={"scratch", "cache_teacher"}))
    return {**_network(job, "student"), "distill": distill}


def _attack(job: Job) -> dict[str, Any]:
    # The networks' digests stand for the data that they were trained on; its test part is in the data's digest.
    data = job.recipe.data
    spec = job.recipe.attack.model_dump() if job.recipe.attack else {}
    return {**spec, "seed": job.recipe.seed, "data": data.model_dump(mode="json", exclude=set(data.options))}


def _onnx(subject: str, job: Job) -> dict[str, Any]:
    spec = job.recipe.export
    return {**spec.model_dump(mode="json"), "opset": spec.opset or job.target.opset, "form": job.form(subject)}


def _quantize(job: Job) -> dict[str, Any]:
    spec = job.recipe.quantize
    named = {"calibration_sha256": sha256_of(calibration.find(spec.calibration))} if spec.calibration else {}
    budget = {"accuracy_drop": job.recipe.budgets.accuracy_drop} if spec.options.get("auto_mixed") else {}
    return {**spec.model_dump(mode="json", exclude={"calibration"}), **named, **budget}


def _finetune(job: Job) -> dict[str, Any]:
    # The student's digest stands for its network and data; how it is written as ONNX is part of what comes out.
    distill = by_content(job.recipe.distill.model_dump(exclude={"scratch", "cache_teacher"}))
    return {**_quantize(job), "distill": distill, "seed": job.recipe.seed, **_onnx("student", job)}


def _engine(job: Job) -> dict[str, Any]:
    return {"backend": job.choice.name, "options": job.choice.options, "threads": job.target.threads}


def _build(job: Job) -> dict[str, Any]:
    return {"run": job.run_id}


def _kit(job: Job) -> dict[str, Any]:
    return {**job.recipe.benchmark.model_dump(mode="json"), "seed": job.recipe.seed, "code": stages.code_sha256(job)}


def _bench(job: Job) -> dict[str, Any]:
    return {"run": job.run_id, **job.recipe.benchmark.model_dump(mode="json")}


def _checkpoint(path: Path) -> str:
    if not path.is_file():
        raise CheckpointError(
            f"teacher.checkpoint = {shown(path)}: there is no such file",
            allowed="expected: a safetensors file or a torch state dict",
            fix="correct the path, or drop it to train the teacher here",
            key="teacher.checkpoint",
        )
    return sha256_of(path)


def _quantizes(job: Job) -> bool:
    return job.recipe.quantize.method != "none"


def _attacks(job: Job) -> bool:
    return job.recipe.attack is not None


def _spreads(job: Job) -> bool:
    return job.recipe.student.network == "spread"


def _finetunes(job: Job) -> bool:
    return job.quantizer().trains


def _builds_there(job: Job) -> bool:
    return job.backend.builds_on == "device" and job.has_device


# `inputs` names all stages that it may read: those that a job does not want are not there.
TABLE: tuple[Stage, ...] = (
    Stage("teacher", stages.teacher, _teacher, trains=True),
    Stage("scratch", stages.scratch, _scratch, wanted=lambda job: job.recipe.distill.scratch, trains=True),
    Stage("student", stages.student, _student, ("teacher",), trains=True),
    Stage("attack", stages.attack, _attack, ("teacher", "scratch", "student"), wanted=_attacks),
    Stage("parts", stages.parts, partial(_onnx, "student"), ("student",), wanted=_spreads),
    *(Stage(f"onnx-{one}", partial(stages.onnx, one), partial(_onnx, one), (one,)) for one in SUBJECTS),
    Stage("finetune", stages.finetune, _finetune, ("teacher", "student"), wanted=_finetunes, trains=True),
    Stage(
        "quantize", stages.quantize, _quantize, ("teacher", "student", "onnx-student", "finetune"), wanted=_quantizes
    ),
    Stage("engine-teacher", partial(stages.engine, "teacher"), _engine, ("onnx-teacher",), version=2),
    Stage("engine-student", partial(stages.engine, "student"), _engine, ("onnx-student", "quantize"), version=2),
    # Whether what was built before still fits is for the board to say: it is asked in every run.
    *(
        Stage(
            f"build-{one}", partial(stages.build, one), _build, (f"engine-{one}",), wanted=_builds_there, measures=True
        )
        for one in SUBJECTS
    ),
    Stage(
        "kit",
        stages.pack,
        _kit,
        ("onnx-student", "onnx-teacher", "quantize", "engine-student", "engine-teacher"),
        wanted=lambda job: not job.has_device,
    ),
    Stage(
        "bench",
        stages.bench,
        _bench,
        ("engine-student", "engine-teacher", "build-student", "build-teacher"),
        measures=True,
    ),
)
# The last stage that each command of the command line needs; it runs that one and all above it.
LAST = {"distill": "attack", "export": "onnx-student", "quantize": "quantize", "compile": "build-student",
        "bench": "bench", "run": "bench"}  # fmt: skip


def last_stage(command: str, job: Job) -> str:
    """Where a command ends. For a board that is not named it is a kit, which somebody carries there."""
    return "kit" if command in ("export", "run") and not job.has_device else LAST[command]


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


def needed(job: Job, last: str) -> list[Stage]:
    """The stages up to `last`, in order."""
    names = [stage.name for stage in TABLE]
    return [stage for stage in TABLE[: names.index(last) + 1] if stage.wanted(job)]


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
