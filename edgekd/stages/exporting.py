"""The stages that make ONNX files: export from torch, and quantization."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import __version__, backends, registry
from edgekd.artifact import Artifact
from edgekd.backends import Backend, Engine
from edgekd.errors import ExportError
from edgekd.quantize.quantizers import ModelQuantizer, Samples
from edgekd.stages.job import CURVES, LABELS, LOGITS, MODEL, Array, Inputs, Job, test_logits
from edgekd.tasks import Task

# Less work than this is not shared by threads: on a busy machine they mostly wait for each other.
SMALL_MACS = 1e11
ROUNDED_BRANCHES = (
    "The quantized rung is the graph as it is written, for TensorRT and TVM. ONNX Runtime computes in integers only"
    " where biases and the branches of residual additions are rounded too, so its engine may answer otherwise on a few"
    " samples."
)
# Shares of the test images on which the deployed model may answer otherwise than what was trained: beyond the first the
# report warns, beyond the second the graph is another one. Single codes flip where a sum lies between two of them, and
# a jump of LMA makes more of that.
DISAGREEMENT, OTHER_GRAPH = 0.001, 0.01


def onnx(subject: str, job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Export a network, and compare what ONNX Runtime makes of it with torch, on the whole test set."""
    from edgekd import export, parity

    spec, test = job.recipe.export, job.dataset.test
    network = job.restore(subject, inputs[subject])
    job.on_progress(0.1, "exporting")
    result = export.export(
        network, out / MODEL, example=job.images(0, 1), **export_settings(job, subject, inputs[subject])
    )
    job.on_progress(0.5, "comparing with torch")
    try:
        small = inputs[subject].result["macs"] * len(test) < SMALL_MACS
        logits = test_logits(job, reference(out / MODEL, work, threads=1 if small else len(os.sched_getaffinity(0))))
    except Exception as error:  # ONNX Runtime's own, which have no common class
        raise ExportError(
            f"ONNX Runtime cannot run {subject}.onnx: {(str(error).splitlines() or [type(error).__name__])[0]}",
            allowed=f"it was exported for a {spec.batch} batch, opset {result['opset']}",
            fix="set export.batch = static, or try another export.opset",
        ) from error
    found = parity.parity(
        network, lambda index: job.dataset.normalize(test.images[index]), np.load(inputs[subject].file(LOGITS)), logits,
        spec.tolerance, job.task,
    )  # fmt: skip
    found.check(f"{subject}.onnx")
    np.save(out / LOGITS, logits)
    return {**result, "parity": found.as_dict(), **job.measured(logits)}


def quantize(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Write the quantized student, and account for what it cost: in accuracy, layer by layer, class by class."""
    import onnx as onnx_package

    from edgekd.quantize import account, dialects

    quantizer, dataset, exported = job.quantizer(), job.dataset, inputs["onnx-student"]
    samples = dataset.normalize(job.calibration.samples.images)
    if "finetune" in inputs:
        shutil.copyfile(inputs["finetune"].file(MODEL), out / MODEL)
        facts = inputs["finetune"].result["quantizer"]
    else:
        assert isinstance(quantizer, ModelQuantizer)
        facts = quantizer.write(exported.file(MODEL), out / MODEL, _samples(job, inputs, samples))
    job.on_progress(0.8, "measuring on the test set")
    # ONNX Runtime's optimizer rounds biases, which TensorRT does not: here the graph is computed as it is written.
    logits = test_logits(job, reference(out / MODEL, work, threads=1, graph_optimization="disabled"))
    np.save(out / LOGITS, logits)
    np.save(out / LABELS, dataset.test.labels)
    measured, before = job.measured(logits), np.load(exported.file(LOGITS))
    job.on_progress(0.9, "comparing layer by layer")
    model = onnx_package.load(out / MODEL)
    stored = dialects.translated(model, "onnxruntime_uint8").ByteSize()  # weights as their codes
    curves = json.loads(inputs.get("finetune", inputs["student"]).file(CURVES).read_text(encoding="utf-8"))
    found = account.of(model, curves, samples[: account.IMAGES]) | facts.get("account", {})
    agreement = _agreement(job.task, inputs["finetune"], logits) if "finetune" in inputs else None
    return {
        **measured,
        "size_bytes": stored,
        "method": job.recipe.quantize.method,
        "precision": quantizer.precision,
        "options": job.recipe.quantize.options,
        "calibration": job.calibration.about,
        "calibrate": facts.get("calibrate"),
        "search": facts.get("search"),
        "keep_float": facts.get("keep_float", []),
        "accuracy": {"n": measured["n"], "float_score": exported.result["score"], "score": measured["score"]},
        "size": {"float_bytes": exported.result["size_bytes"], "bytes": stored},
        "classes": account.classes(job.task, dataset.test.labels, before, logits, dataset.class_names),
        **found,
        "agreement": agreement,
        "notes": [ROUNDED_BRANCHES] if dialects.rounds_branches(model) else [],
        "warnings": [*job.calibration.warnings, *facts.get("warnings", []), *_disagreement(agreement)],
        "suggestions": [row["suggestion"] for row in found["layers"] if row["suggestion"]],
    }


def _samples(job: Job, inputs: Inputs, calibration: Array) -> Samples:
    """What a quantizer of ONNX models may look at."""
    dataset, drop = job.dataset, job.recipe.budgets.accuracy_drop
    target = None
    # Without a teacher, what the student reaches in float is what is to be kept.
    compared = "teacher" if "teacher" in job.subjects else "student"
    if job.recipe.quantize.options.get("auto_mixed") and (drop is not None or compared == "student"):
        from edgekd import distill

        job.on_progress(0.0, f"measuring the {compared} on the validation split")
        logits = distill.predict(job.restore(compared, inputs[compared]), dataset.val, dataset)
        target = job.task.score(logits, dataset.val.labels) - job.task.metric.goodness(drop or 0.0)
    images = dataset.normalize(dataset.val.images)
    return Samples(calibration, images, dataset.judge("val"), target, job.on_progress)


def _agreement(task: Task, trained: Artifact, logits: Array) -> dict[str, Any]:
    """What was trained, by torch, against the model that is deployed, by ONNX Runtime, on the test set."""
    expected = np.load(trained.file(LOGITS))
    agreement = task.agreement(expected, logits)
    found = {"n": len(logits), "agreement": agreement, "max_difference": float(np.abs(expected - logits).max())}
    if agreement < 1 - max(1 / len(logits), OTHER_GRAPH):
        raise ExportError(
            f"the quantized model answers otherwise than the network that was trained: they agree on {agreement:.2%} of"
            f" {len(logits)} test images",
            allowed=f"expected: {1 - OTHER_GRAPH:.0%} at least; the largest difference is"
            f" {found['max_difference']:.3g}",
            fix="use quantize.method = ptq, and report this network",
        )
    return found


def _disagreement(agreement: dict[str, Any] | None) -> list[str]:
    if agreement is None or agreement["agreement"] >= 1 - max(DISAGREEMENT, 1 / agreement["n"]):
        return []
    share = f"{agreement['agreement']:.2%}"
    return [f"The deployed graph and the network that was trained give the same answer to {share} of the test images."]


def export_settings(job: Job, subject: str, artifact: Artifact) -> dict[str, Any]:
    """How a network of this job is written as ONNX, as keywords of `export.export`."""
    spec = job.recipe.export
    return {
        "opset": spec.opset or job.target.opset,
        "form": job.form(subject),
        "dynamic_batch": spec.batch == "dynamic",
        "metadata": _metadata(job, subject, artifact),
    }


def _metadata(job: Job, subject: str, artifact: Artifact) -> dict[str, Any]:
    """What a user of the ONNX file alone has to know; `Image.BitmapPixelFormat` is a key of the ONNX standard."""
    dataset, part = job.dataset, job.part(subject)
    recipe = json.dumps(artifact.manifest["spec"], sort_keys=True)  # the part of it that made this network
    return {
        "task": f"image-{job.task.name}",
        "class_names": list(dataset.class_names),
        **job.task.about_outputs(),
        "input_size": list(dataset.shape.dimensions),
        "input_layout": "NCDHW" if dataset.shape.depth else "NCHW",
        "preprocessing": "(pixel / 255 - mean) / std",
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "Image.BitmapPixelFormat": "Gray8" if dataset.shape.channels == 1 else "Rgb8",
        "edgekd.version": __version__,
        "edgekd.network": part.network,
        "edgekd.activation": part.activation,
        "edgekd.recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
    }


def reference(model: Path, work: Path, threads: int, graph_optimization: str = "all") -> Callable[[Array], Array]:
    """ONNX Runtime on the CPU, which says what an ONNX file computes."""
    options = {"graph_optimization": graph_optimization, "lma_table": "never"}
    reference: Backend = registry.create("backend", "onnxruntime", options=options)
    folder = work / "reference"
    folder.mkdir(exist_ok=True)
    reference.compile(model, folder, threads=threads)
    engine = Engine("reference", folder, reference.runner, reference.name)
    run: Callable[[Array], Array] = backends.load_runner(engine).run
    return run
