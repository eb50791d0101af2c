"""The stage that packs a benchmark for a board that cannot be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd import bench, kit
from edgekd.artifact import key_of, sha256_of
from edgekd.compiling import ENGINE
from edgekd.device import AGENT, signers
from edgekd.stages.deploying import benchmark_options, engines_of, pictures_of
from edgekd.stages.job import MODEL, Inputs, Job

ARCHIVE = "edgekd-kit.tar.gz"


def pack(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """One archive with the models, samples, agent and runners; what it brings back is read by `edgekd import`."""
    session = work / "session"
    session.mkdir(exist_ok=True)
    engines = engines_of(job, inputs)
    labels = job.dataset.judge("test", job.recipe.benchmark.accuracy_samples).labels
    pictures = pictures_of(job)
    settings = bench.settings_of(job.mode(), pictures, **benchmark_options(job))
    files = bench.bundle(engines, job.images(0, len(labels)), settings, session, pictures)
    files |= {f"onnx/{subject}.onnx": file for subject, file in _models(job, inputs).items()}
    builds = job.backend.builds_on == "device"
    found = kit.packed(
        out / ARCHIVE, files,
        models=list(engines), name=job.recipe.name, target=job.target.name, backend=job.backend.name,
        built_files=["build.json", *job.backend.built_files] if builds else [],
        commands=[
            *(line for name, one in engines.items() for line in job.backend.build_commands(one.folder, name)),
            "python3 -m agent bench spec.json",
        ],
    )  # fmt: skip
    return {"archive": ARCHIVE, **found}


def code_sha256(job: Job) -> str:
    """Of what is packed beside models and samples."""
    files = [
        *AGENT.glob("*.py"),
        *kit.HERE.iterdir(),
        Path(signers.__file__),
        job.backend.runner,
        *job.backend.libraries(),
    ]
    return key_of(
        "code", 0, {}, {f"{file.parent.name}/{file.name}": sha256_of(file) for file in files if file.is_file()}
    )


def _models(job: Job, inputs: Inputs) -> dict[str, Path]:
    """The ONNX models, where the engine is none."""
    last = {subject: inputs[f"onnx-{subject}"] for subject in job.subjects}
    last["student"] = inputs.get("quantize", last["student"])
    return {
        subject: artifact.file(MODEL)
        for subject, artifact in last.items()
        if not (inputs[f"engine-{subject}"].file(ENGINE) / MODEL).is_file()
    }
