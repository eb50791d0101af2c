"""The stages that compile, build and measure."""

from __future__ import annotations

import shutil
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import backends, building, compiling
from edgekd.artifact import LOG
from edgekd.backends import Engine
from edgekd.bench import benchmark, loadgen
from edgekd.bench.end_to_end import Pictures
from edgekd.compiling import ENGINE
from edgekd.errors import StageError
from edgekd.stages.job import LABELS, LOGITS, MODEL, Inputs, Job, test_logits

PICTURES = 64  # stored images that are timed end to end, again and again


def engine(subject: str, job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Compile a model for the target's preferred backend; where what it made runs here, measure it."""
    model = _dialect(job, inputs, work) if "quantize" in inputs else inputs[f"onnx-{subject}"].file(MODEL)
    result = compiled(subject, job, model, out, work)
    if job.backend.runs_here:
        job.on_progress(0.5, "measuring the engine")
        run = backends.load_runner(Engine(subject, out / ENGINE, job.backend.runner, job.backend.name)).run
        logits = test_logits(job, run)
        np.save(out / LOGITS, logits)
        result |= job.measured(logits)
    return result


def compiled(subject: str, job: Job, model: Path, out: Path, work: Path) -> dict[str, Any]:
    """What the job's backend makes of a model, in the folder `out`; see `edgekd.compiling`."""
    return compiling.compiled(
        model, out, work, job.backend, name=f"{subject}.onnx", threads=job.target.threads, store=job.store,
        on_progress=lambda share, text: job.on_progress(0.2 + 0.3 * share, text),
    )  # fmt: skip


def build(subject: str, job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Build the engine on the very board that runs it; see `edgekd.building`."""
    bundle, log = inputs[f"engine-{subject}"], work / f"{job.backend.name}.log"
    result = building.build(
        bundle.file(ENGINE), out / ENGINE, job.backend, job.open_device(), job.store,
        name=f"the {subject}", digest=bundle.digest, log=log, on_progress=job.on_progress,
    )  # fmt: skip
    (out / LOG).mkdir()
    shutil.copyfile(log, out / LOG / log.name)
    return result


def bench(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Deploy the engines to the device and measure them there, both interleaved, for speed and accuracy."""
    _check_can_be_asked(job, inputs)
    spec = job.recipe.benchmark
    judge = job.dataset.judge("test", spec.accuracy_samples)
    engines = engines_of(job, inputs)
    session = work / "session"
    found = benchmark(
        engines["student"], engines.get("teacher"), samples=job.images(0, len(judge.labels)), judge=judge,
        device=job.open_device(), workdir=session, mode=job.mode(), pictures=pictures_of(job),
        **benchmark_options(job),
        on_progress=lambda share, left_s, text: job.on_progress(share, text),
    )  # fmt: skip
    for file in session.iterdir():
        if file.is_file() and file.name != "samples.npy":  # the images can be made again from the data, and are large
            shutil.copy(file, out)
    np.save(out / LABELS, judge.labels)
    if spec.loadgen:
        job.on_progress(1.0, "timing with LoadGen")
        found["loadgen"] = loadgen.cross_check(
            engines, job.images(0, loadgen.HOT_SAMPLES), seconds=job.mode().seconds, found=found["latency"]
        )
    if not job.has_test:  # timed on noise, whose labels mean nothing
        found |= {"accuracy": {name: {} for name in engines}, "accuracy_change": None}
    return found


def _check_can_be_asked(job: Job, inputs: Inputs) -> None:
    """Raises StageError where engines were built by a program that alone can run them, and has timed them."""
    built = {name: inputs[name] for name in (f"build-{one}" for one in job.subjects) if name in inputs}
    timed = {name: artifact.result.get("timed", {}) for name, artifact in built.items()}
    if not all(timed.values()) or not timed:
        return
    build = inputs["build-student"].result
    medians = [
        f"{name.removeprefix('build-')} {times['kernels_alone']['latency']['median']:g} ms"
        for name, times in timed.items()
        if "latency" in times.get("kernels_alone", {})
    ]
    raise StageError(
        f'the engines on "{build["url"]}" can be run by {build["module"]} alone, which built them',
        allowed=f"what {build['module']} {build['version']} timed: {', '.join(medians) or 'nothing'}",
        fix="see edgekd report; from TensorRT 8.5 on, with its Python module: sudo apt install python3-libnvinfer",
    )


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


def engines_of(job: Job, inputs: Inputs) -> dict[str, Engine]:
    """What runs on the device, by subject: what was built there, where that is where it is built."""
    made = {one: inputs.get(f"build-{one}", inputs[f"engine-{one}"]) for one in job.subjects}
    backend, libraries = job.backend, tuple(job.backend.libraries())
    return {
        one: Engine(one, artifact.file(ENGINE), backend.runner, backend.name, libraries)
        for one, artifact in made.items()
    }


def _dialect(job: Job, inputs: Inputs, work: Path) -> Path:
    """The quantized model as the backend wants it written."""
    import onnx

    from edgekd.quantize import dialects

    file = work / MODEL
    onnx.save(dialects.translated(onnx.load(inputs["quantize"].file(MODEL)), job.backend.dialect), file)
    return file
