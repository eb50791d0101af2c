"""The stages that compile and measure."""

from __future__ import annotations

import shutil
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import backends
from edgekd.artifact import LOG
from edgekd.backends import Engine
from edgekd.bench import benchmark, loadgen
from edgekd.bench.end_to_end import Pictures
from edgekd.errors import StageError
from edgekd.stages.job import ENGINE, LABELS, LOGITS, MODEL, Inputs, Job, test_logits

PICTURES = 64  # stored images that are timed end to end, again and again


def engine(subject: str, job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Compile a model for the target's preferred backend; where what it made runs here, measure it."""
    model = _dialect(job, inputs, work) if "quantize" in inputs else inputs[f"onnx-{subject}"].file(MODEL)
    built, result = compiled(subject, job, model, out)
    if job.backend.builds_on == "host":
        result["evidence"] = "compiled_on_host"
        result["size_bytes"] = size_of(built.folder)
    if job.backend.runs_here:
        job.on_progress(0.5, "measuring the engine")
        run = backends.load_runner(built).run
        logits = test_logits(job, run)
        np.save(out / LOGITS, logits)
        result |= job.measured(logits)
    return result


def compiled(subject: str, job: Job, model: Path, out: Path) -> tuple[Engine, dict[str, Any]]:
    """The engine that the job's backend makes of a model, in the folder `out`, and what is known of it."""
    found = _examined(job, subject, model, out / LOG)
    job.on_progress(0.2, f"compiling for {job.backend.name}")
    built = Engine(subject, out / ENGINE, job.backend.runner, job.backend.name)
    built.folder.mkdir()
    job.backend.kept = job.store.cache("compile", [job.backend.name])
    job.backend.on_progress = lambda share, text: job.on_progress(0.2 + 0.3 * share, text)
    facts = job.backend.compile(model, built.folder, threads=job.target.threads)
    return built, {"backend": job.backend.name, "facts": facts, **found}


def _examined(job: Job, subject: str, model: Path, log: Path) -> dict[str, Any]:
    """What is known of a model before its device is reached: {evidence, findings, compiled}. Raises StageError when its
    compiler would refuse it; one that crashes or hangs, and is not the one that will compile it, proves nothing."""
    log.mkdir()
    try:
        found = job.backend.examine(model, log / "compiler.log")
    except StageError as error:
        if job.backend.builds_on == "host":
            raise
        problems = [{"node": "", "reason": one, "fix": "", "effect": "rejected"} for one in job.backend.check(model)]
        found = {"evidence": "linted", "findings": problems, "compiled": {"alarms": [error.what], "refused": []}}
    compiled = found["compiled"] or {}
    reasons = [
        f"{row['node']}: {row['reason']}; {row['fix']}" if row["node"] else row["reason"]
        for row in found["findings"]
        if row["effect"] == "rejected"
    ] or list(compiled.get("refused", ()))
    if reasons:
        raise StageError(
            f"backend {job.backend.name} cannot run {subject}.onnx: {reasons[0]}",
            allowed=f"{len(reasons)} problem{'s' * (len(reasons) > 1)} in all",
            fix="choose another backend in the target, or change the network",
        )
    known = {name: compiled[name] for name in ("compiler", "kernels", "alarms") if name in compiled}
    return {
        "evidence": found["evidence"],
        "findings": [{name: row[name] for name in ("node", "reason", "fix")} for row in found["findings"]],
        "compiled": {**known, "layers": compiled.get("precisions", [])} if compiled else None,
    }


def bench(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Deploy both engines to the device and measure them there, interleaved, for speed and accuracy."""
    spec = job.recipe.benchmark
    judge = job.dataset.judge("test", spec.accuracy_samples)
    engines = {subject: engine_of(subject, job, inputs) for subject in ("student", "teacher")}
    session = work / "session"
    found = benchmark(
        engines["student"], engines["teacher"], samples=job.images(0, len(judge.labels)), judge=judge,
        device=job.open_device(), workdir=session, mode=job.mode(), pictures=pictures_of(job),
        **benchmark_options(job),
        on_progress=lambda share, left_s, text: job.on_progress(share, text),
    )  # fmt: skip
    for file in session.iterdir():
        if file.is_file() and file.name != "samples.npy":  # the images can be made again from the data, and are large
            shutil.copy(file, out)
    np.save(out / LABELS, judge.labels)
    if spec.loadgen:
        job.on_progress(1.0, "timing both with LoadGen")
        found["loadgen"] = loadgen.cross_check(
            engines, job.images(0, loadgen.HOT_SAMPLES), seconds=job.mode().seconds, found=found["latency"]
        )
    if not job.has_test:  # timed on noise, whose labels mean nothing
        found |= {"accuracy": {"student": {}, "teacher": {}}, "accuracy_change": None}
    return found


def pictures_of(job: Job) -> Pictures | None:
    """The stored images that are timed end to end, where the recipe asks for that."""
    if not job.recipe.benchmark.end_to_end:
        return None
    data = job.dataset
    return Pictures(data.test.stored(PICTURES), astuple(data.shape), data.mean, data.std)


def benchmark_options(job: Job) -> dict[str, Any]:
    """How the recipe wants it measured, beside the mode."""
    spec = job.recipe.benchmark
    return {"launches": spec.launches, "lock_clocks": spec.lock_clocks, "seed": job.recipe.seed}


def engine_of(subject: str, job: Job, inputs: Inputs) -> Engine:
    """What runs on the device: what was built there, where that is where it is built."""
    made = inputs.get(f"build-{subject}", inputs[f"engine-{subject}"])
    libraries = tuple(job.backend.libraries())
    return Engine(subject, made.file(ENGINE), job.backend.runner, job.backend.name, libraries)


def _dialect(job: Job, inputs: Inputs, work: Path) -> Path:
    """The quantized model as the backend wants it written."""
    import onnx

    from edgekd.quantize import dialects

    file = work / MODEL
    onnx.save(dialects.translated(onnx.load(inputs["quantize"].file(MODEL)), job.backend.dialect), file)
    return file


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
