"""The stages that train: teacher, scratch, student, and the student as its quantizer computes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd import registry
from edgekd.artifact import LOG, by_content
from edgekd.quantize.quantizers import TrainingQuantizer
from edgekd.recipe import Train
from edgekd.stages.exporting import export_settings
from edgekd.stages.job import CURVES, LABELS, LOGITS, MODEL, WEIGHTS, Inputs, Job, warnings_of
from edgekd.tasks import Judge

# How a finetuning differs from the training that it follows, next to its length and learning rate.
FINETUNE = {"warmup": 0, "schedule": "cosine", "ema": 0.0, "compile": False, "precision": "fp32"}

if TYPE_CHECKING:
    from torch import nn

    from edgekd.distill import Trained
    from edgekd.methods import Method
    from edgekd.networks import Structure


def teacher(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Train the teacher, or load the user's checkpoint; and measure it."""
    from edgekd import distill, networks

    network, spec = job.build("teacher"), job.recipe.teacher
    assert spec is not None
    if spec.checkpoint is None and not networks.is_trained(network):
        trained = _train(job, network, spec.train, registry.create("method", "scratch"), None, work, None)
        return _network_result(job, "teacher", network, trained, out, work)
    facts = {} if spec.checkpoint is None else networks.load_weights(network, spec.checkpoint)
    network.to(distill.processes().device)
    return _network_result(job, "teacher", network, None, out, work, facts.get("structure"))


def scratch(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Train the student's network without the teacher, on the student's budget: the baseline."""
    network = job.build("student")
    trained = _train(job, network, job.recipe.distill.train, registry.create("method", "scratch"), None, work, None)
    return _network_result(job, "student", network, trained, out, work)


def student(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Distill the teacher into the student; and measure it."""
    network = job.build("student")
    method = job.method()
    frozen = job.restore("teacher", inputs["teacher"]) if method.needs_teacher else None
    spec = job.recipe.distill.train
    cache = _cache(job, inputs, spec.precision) if frozen is not None else None
    trained = _train(job, network, spec, method, frozen, work, cache)
    return _network_result(job, "student", network, trained, out, work, _shrunk(job, network))


def _shrunk(job: Job, network: nn.Module) -> Structure:
    """Take from the student what its weights do not use: channels that a method has silenced, low ranks."""
    import torch

    from edgekd import networks

    before = networks.count_params(network), networks.count_macs(network, job.dataset.shape)
    example = torch.from_numpy(job.dataset.normalize(job.dataset.train.images[:2]))
    with warnings_of("edgekd.networks") as notes:
        structure = networks.shrink(network, example.to(next(network.parameters()).device))
    if structure:
        after = networks.count_params(network), networks.count_macs(network, job.dataset.shape)
        lost = sum(len(cut["outputs"]) for cut in structure.get("removed", {}).values())
        factored = len(structure.get("factored", {}))
        notes.append(
            f"The student is smaller than the network that the recipe names: {lost} channels of its layers were not"
            f" needed, {factored} convolutions had a low rank. {after[0]:,} of {before[0]:,} parameters are left,"
            f" {after[1]:,} of {before[1]:,} multiply-accumulates."
        )
    job.notes["student"] = [*job.notes["student"], *notes]
    return structure


def finetuning(job: Job, quantizer: TrainingQuantizer) -> Train:
    """How long and how a student is finetuned: as it was distilled, but for what the quantizer says."""
    return job.recipe.distill.train.model_copy(update={**FINETUNE, "epochs": quantizer.epochs, "lr": quantizer.lr})


def finetune(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Train the student further as its quantizer computes it, by the recipe's distillation method; and write it."""
    import torch

    from edgekd import activations, distill

    quantizer, dataset = job.quantizer(), job.dataset
    assert isinstance(quantizer, TrainingQuantizer)
    network, method = job.restore("student", inputs["student"]), job.method(finetuning=True)
    images = torch.from_numpy(dataset.normalize(job.calibration.samples.images))
    job.on_progress(0.0, "preparing the student")
    prepared = quantizer.prepare(network, images)
    spec = finetuning(job, quantizer)
    frozen = job.restore("teacher", inputs["teacher"]) if method.needs_teacher else None
    cache = _cache(job, inputs, spec.precision) if frozen is not None else None
    trained = _train(job, prepared, spec, method, frozen, work, cache)
    if not distill.processes().is_main_process:
        return {}
    logits = distill.predict(prepared, dataset.test, dataset)
    np.save(out / LOGITS, logits)
    np.save(out / LABELS, dataset.test.labels)
    job.on_progress(1.0, "exporting")
    settings = export_settings(job, "student", inputs["student"])
    facts = quantizer.export(prepared, network, out / MODEL, example=job.images(0, 1), **settings)
    (out / CURVES).write_text(json.dumps(activations.curves(network)), encoding="utf-8")
    _keep_log(work, out)
    return {**job.measured(logits), "quantizer": facts, "epochs": trained.epochs, "kept_epoch": trained.kept}


def _train(
    job: Job, network: nn.Module, spec: Train, method: Method, frozen: nn.Module | None, work: Path, cache: Path | None
) -> Trained:
    from edgekd import distill

    def on_progress(at: distill.Progress) -> None:
        newest = "first epoch"
        if at.metrics:
            val = [f"val {job.task.metric.text(at.metrics['val_score'])}"] if "val_score" in at.metrics else []
            newest = ", ".join([*val, f"loss {at.metrics['train_loss']:.3f}"])
        job.on_progress(at.done / at.total, newest)

    return distill.train(
        network, job.dataset, spec, method, teacher=frozen, augment=job.recipe.data.augment, seed=job.recipe.seed,
        work=work / "training", logits_cache=cache, on_progress=on_progress,
    )  # fmt: skip


def _cache(job: Job, inputs: Inputs, precision: str) -> Path | None:
    """Where the teacher's logits are kept, if the recipe wants that."""
    if not job.recipe.distill.cache_teacher:
        return None
    facts = [inputs["teacher"].digest, job.recipe.data.model_dump(), job.fingerprint, precision]
    return job.store.cache("teacher-logits", facts)


def _keep_log(work: Path, out: Path) -> None:
    """Put the log of a training into its artifact, without the checkpoint."""
    from edgekd import distill

    unfinished = shutil.ignore_patterns(f"{distill.CHECKPOINT}*")
    shutil.copytree(work / "training", out / LOG, ignore=unfinished)


def _network_result(
    job: Job, subject: str, network: nn.Module, trained: Trained | None, out: Path, work: Path,
    structure: Structure | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a network on the test split, once, and write what the stages below it read."""
    import torch

    from edgekd import activations, distill, networks

    if not distill.processes().is_main_process:
        return {}  # a helper of a distributed run has helped to train; the first process measures and stores
    job.on_progress(1.0, "measuring on the test set")
    dataset, part = job.dataset, job.part(subject)
    logits = distill.predict(network, dataset.test, dataset)
    np.save(out / LOGITS, logits)
    np.save(out / LABELS, dataset.test.labels)
    about = {"network": part.network, "options": by_content(part.options), "activation": part.activation}
    about |= {"structure": structure} if structure else {}
    shape = {"shape": list(dataset.shape.dimensions), "outputs": list(dataset.outputs)}
    networks.save_weights(network, out / WEIGHTS, {**about, **shape})
    x = dataset.normalize(dataset.val.images[: distill.evaluation_batch(dataset)])
    inputs = activations.input_histograms(network, torch.from_numpy(x).to(next(network.parameters()).device))
    curves = [curve | {"inputs": own} for curve, own in zip(activations.curves(network), inputs, strict=True)]
    (out / CURVES).write_text(json.dumps(curves), encoding="utf-8")
    result = {
        **job.measured(logits),
        "params": networks.count_params(network),
        "macs": networks.count_macs(network, dataset.shape),
        "class_angles": networks.class_angles(network, dataset.num_classes),
        "size_bytes": (out / WEIGHTS).stat().st_size,
        "class_names": list(dataset.class_names),
        "notes": [*dataset.notes, *job.notes[subject]],
    }
    if dataset.target is not None:
        answers, test = distill.predict(network, dataset.target.test, dataset), dataset.target.test
        score = Judge(dataset.task, test.labels, dataset.outputs).score(answers)
        text = dataset.task.metric.text(score)
        result["target"] = {"name": dataset.target.name, "score": score, "n": len(test), "text": text}
    if trained is not None:
        _keep_log(work, out)
        result |= {"epochs": trained.epochs, "kept_epoch": trained.kept}
    return result
