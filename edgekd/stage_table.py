"""The stage table: what there is to make, of what it is made, and where each command ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from edgekd import stages
from edgekd.artifact import by_content, sha256_of
from edgekd.data import calibration, fingerprint
from edgekd.errors import CheckpointError, shown
from edgekd.recipe import choice_from_yaml
from edgekd.stages import Inputs, Job

# The order in which both are made where a job has both: the student learns from the teacher.
SUBJECTS = ("teacher", "student")


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
    spec, data = job.part(part), job.recipe.data
    own = {"source_sha256": source} if (source := _source_sha256(spec.network)) else {}
    own |= {"target_sha256": fingerprint(*choice_from_yaml(data.target_domain))} if data.target_domain else {}
    return {
        part: by_content(spec.model_dump(exclude={"checkpoint"})),
        "seed": job.recipe.seed,
        # The sources' options are in the data's fingerprints, except for where its files lie.
        "data": data.model_dump(mode="json", exclude={*data.options, "target_domain"}),
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
    assert spec is not None
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


def _corrupt(job: Job) -> dict[str, Any]:
    # The data's fingerprint is in every key; its split is not in that of an ONNX file that came out the same.
    data = job.recipe.data
    spec = job.recipe.corruptions.model_dump() if job.recipe.corruptions else {}
    return {**spec, "batch": job.recipe.export.batch, "data": data.model_dump(mode="json", exclude=set(data.options))}


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


def _has(subject: str, job: Job) -> bool:
    return subject in job.subjects


def _quantizes(job: Job) -> bool:
    return job.recipe.quantize.method != "none"


def _corrupts(job: Job) -> bool:
    return job.recipe.corruptions is not None


def _attacks(job: Job) -> bool:
    return job.recipe.attack is not None


def _spreads(job: Job) -> bool:
    return job.recipe.student.network == "spread"


def _finetunes(job: Job) -> bool:
    return job.quantizer().trains


def _builds_there(subject: str, job: Job) -> bool:
    return _has(subject, job) and job.backend.builds_on == "device" and job.has_device


# `inputs` names all stages that it may read: those that a job does not want are not there.
TABLE: tuple[Stage, ...] = (
    Stage("teacher", stages.teacher, _teacher, wanted=partial(_has, "teacher"), trains=True),
    Stage("scratch", stages.scratch, _scratch, wanted=lambda job: job.has_baseline, trains=True),
    Stage("student", stages.student, _student, ("teacher",), trains=True),
    Stage("attack", stages.attack, _attack, ("teacher", "scratch", "student"), wanted=_attacks),
    Stage("parts", stages.parts, partial(_onnx, "student"), ("student",), wanted=_spreads),
    Stage("boards", stages.boards, _bench, ("parts",), wanted=lambda job: bool(job.boards), measures=True),
    *(
        Stage(f"onnx-{one}", partial(stages.onnx, one), partial(_onnx, one), (one,), wanted=partial(_has, one))
        for one in SUBJECTS
    ),
    Stage("corrupt", stages.corrupt, _corrupt, ("onnx-teacher", "onnx-student"), wanted=_corrupts),
    Stage("finetune", stages.finetune, _finetune, ("teacher", "student"), wanted=_finetunes, trains=True),
    Stage(
        "quantize", stages.quantize, _quantize, ("teacher", "student", "onnx-student", "finetune"), wanted=_quantizes
    ),
    Stage(
        "engine-teacher",
        partial(stages.engine, "teacher"),
        _engine,
        ("onnx-teacher",),
        version=3,
        wanted=partial(_has, "teacher"),
    ),
    Stage("engine-student", partial(stages.engine, "student"), _engine, ("onnx-student", "quantize"), version=3),
    # Whether what was built before still fits is for the board to say: it is asked in every run.
    *(
        Stage(
            f"build-{one}",
            partial(stages.build, one),
            _build,
            (f"engine-{one}",),
            wanted=partial(_builds_there, one),
            measures=True,
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
LAST = {"distill": "attack", "export": "onnx-student", "eval": "corrupt",
        "quantize": "quantize", "compile": "build-student",
        "bench": "bench", "run": "bench"}  # fmt: skip


def last_stage(command: str, job: Job) -> str:
    """Where a command ends. For a board that is not named it is a kit, which somebody carries there."""
    if job.boards:
        return "boards"
    return "kit" if command in ("export", "run") and not job.has_device else LAST[command]


def needed(job: Job, last: str) -> list[Stage]:
    """The stages up to `last`, in order."""
    names = [stage.name for stage in TABLE]
    return [stage for stage in TABLE[: names.index(last) + 1] if stage.wanted(job)]
