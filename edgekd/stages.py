"""What each stage makes. A stage is a function of the job, its input artifacts and two folders: the artifact to fill,
and scratch that survives a kill. It returns the result that goes into the manifest.

torch is imported inside the stages that train or export: planning and reporting work without it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekd import __version__, backends, data, registry
from edgekd.artifact import LOG, Artifact, Store
from edgekd.backends import Backend, Engine
from edgekd.bench import benchmark
from edgekd.data import Dataset
from edgekd.device import Device
from edgekd.errors import ExportError, StageError
from edgekd.recipe import Choice, Network, Recipe, Train, choice_from_yaml
from edgekd.target import Target

if TYPE_CHECKING:
    from torch import nn

    from edgekd.distill import Trained
    from edgekd.methods import Method

WEIGHTS = "weights.safetensors"
LOGITS = "test_logits.npy"
LABELS = "test_labels.npy"
CURVES = "activations.json"
MODEL = "model.onnx"
# What a backend compiled: the folder that goes to the device, and nothing else of the artifact.
ENGINE = "engine"
# Less work than this is not shared by threads: on a busy machine they mostly wait for each other.
SMALL_MACS = 1e11
_log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
OnProgress = Callable[[float, str], None]
Inputs = Mapping[str, Artifact]


@dataclass
class Job:
    """One recipe for one target, with the store that its artifacts live in."""

    recipe: Recipe
    target: Target
    store: Store
    run_id: str
    created: str
    command: str
    device: str = ""
    on_progress: OnProgress = field(default=lambda share, text: None)
    # What building a network had to leave as it was, by teacher and student.
    notes: dict[str, list[str]] = field(default_factory=dict)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data, read when first asked for."""
        spec = self.recipe.data
        self.on_progress(0.0, "reading the data")
        return data.load(
            spec.source, spec.options, validation=spec.validation, seed=spec.seed, train_limit=spec.train_limit,
            test_limit=spec.test_limit, normalize=spec.normalize.model_dump() if spec.normalize else None,
        )  # fmt: skip

    @functools.cached_property
    def fingerprint(self) -> str:
        """The data's identity, known without decoding it."""
        return data.fingerprint(self.recipe.data.source, self.recipe.data.options)

    @property
    def choice(self) -> Choice:
        """The target's preferred backend."""
        return self.target.choices[0]

    @functools.cached_property
    def backend(self) -> Backend:
        """What compiles for the target."""
        made: Backend = registry.create("backend", self.choice.name, options=self.choice.options)
        return made

    def part(self, subject: str) -> Network:
        """The recipe's section for `teacher` or `student`."""
        return self.recipe.teacher if subject == "teacher" else self.recipe.student

    def form(self, subject: str) -> str:
        """The ONNX form of this network's multi-segment activations."""
        if self.recipe.export.form != "auto":
            return self.recipe.export.form
        options = choice_from_yaml(self.part(subject).activation).options
        return self.backend.forms["continuous" if options.get("continuous") else "any"]

    def build(self, subject: str) -> nn.Module:
        """The recipe's teacher or student, untrained."""
        from edgekd import networks

        part = self.part(subject)
        activation = choice_from_yaml(part.activation)
        shape, num_classes = self.dataset.shape, self.dataset.num_classes
        with _warnings_of("edgekd.networks") as notes:
            network = networks.build(part.network, part.options, shape, num_classes, activation, self.recipe.seed)
        if subject not in self.notes:  # a network is built by several stages: told once
            self.notes[subject] = notes
            for note in notes:
                _log.warning("%s: %s", subject, note)
        return network

    def restore(self, subject: str, artifact: Artifact) -> nn.Module:
        """The recipe's teacher or student with the weights that a stage made."""
        from edgekd import networks

        network = self.build(subject)
        networks.load_weights(network, artifact.file(WEIGHTS))
        return network.eval()

    def images(self, start: int, end: int) -> Array:
        """Test images as a network is fed them: float32 [N, C, H, W]."""
        return self.dataset.normalize(self.dataset.test.images[start:end])

    def method(self) -> Method:
        """The recipe's distillation method."""
        spec = self.recipe.distill
        made: Method = registry.create("method", spec.method, options=spec.options, where="distill")
        return made


def teacher(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Train the teacher, or load the user's checkpoint; and measure it."""
    from edgekd import distill, networks

    network, spec = job.build("teacher"), job.recipe.teacher
    if spec.checkpoint is None:
        trained = _train(job, network, spec.train, registry.create("method", "scratch"), None, work, None)
        return _network_result(job, "teacher", network, trained, out, work)
    networks.load_weights(network, spec.checkpoint)
    return _network_result(job, "teacher", network.to(distill.processes().device), None, out, work)


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
    spec, cache = job.recipe.distill, None
    if frozen is not None and spec.cache_teacher:
        facts = [inputs["teacher"].digest, job.recipe.data.model_dump(), job.fingerprint, spec.train.precision]
        cache = job.store.cache("teacher-logits", facts)
    trained = _train(job, network, spec.train, method, frozen, work, cache)
    return _network_result(job, "student", network, trained, out, work)


def onnx(subject: str, job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Export a network, and compare what ONNX Runtime makes of it with torch, on the whole test set."""
    from edgekd import export, parity

    spec, test = job.recipe.export, job.dataset.test
    network = job.restore(subject, inputs[subject])
    job.on_progress(0.1, "exporting")
    result = export.export(
        network, out / MODEL, example=job.images(0, 1), opset=spec.opset or job.target.opset, form=job.form(subject),
        dynamic_batch=spec.batch == "dynamic", metadata=_metadata(job, subject, inputs[subject]),
    )  # fmt: skip
    job.on_progress(0.5, "comparing with torch")
    try:
        small = inputs[subject].result["macs"] * len(test) < SMALL_MACS
        logits = _test_logits(job, _reference(out / MODEL, work, threads=1 if small else len(os.sched_getaffinity(0))))
    except Exception as error:  # ONNX Runtime's own, which have no common class
        raise ExportError(
            f"ONNX Runtime cannot run {subject}.onnx: {(str(error).splitlines() or [type(error).__name__])[0]}",
            allowed=f"it was exported for a {spec.batch} batch, opset {result['opset']}",
            fix="set export.batch = static, or try another export.opset",
        ) from error
    found = parity.parity(
        network, lambda index: job.dataset.normalize(test.images[index]), np.load(inputs[subject].file(LOGITS)), logits,
        spec.tolerance,
    )  # fmt: skip
    found.check(f"{subject}.onnx")
    np.save(out / LOGITS, logits)
    return {**result, "parity": found.as_dict(), **_accuracy(logits, test.labels)}


def engine(subject: str, job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Compile a model for the target's preferred backend; where that is done here, measure what it made."""
    model = inputs[f"onnx-{subject}"].file(MODEL)
    problems = job.backend.check(model)
    if problems:
        raise StageError(
            f"backend {job.backend.name} cannot run {subject}.onnx: {problems[0]}",
            allowed=f"{len(problems)} problem{'s' * (len(problems) > 1)} in all",
            fix="choose another backend in the target, or change the network",
        )
    job.on_progress(0.2, f"compiling for {job.backend.name}")
    built = Engine(subject, out / ENGINE, job.backend.runner, job.backend.name)
    built.folder.mkdir()
    facts = job.backend.compile(model, built.folder, threads=job.target.threads)
    result: dict[str, Any] = {"backend": job.backend.name, "facts": facts, "size_bytes": _size(built.folder)}
    if job.backend.builds_on == "host":
        job.on_progress(0.5, "measuring the engine")
        run = backends.load_runner(built).run
        logits = _test_logits(job, run)
        np.save(out / LOGITS, logits)
        result |= _accuracy(logits, job.dataset.test.labels)
    return result


def bench(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Deploy both engines to the device and measure them there, interleaved, for speed and accuracy."""
    spec = job.recipe.benchmark
    labels = job.dataset.test.labels[: spec.accuracy_samples]
    engines = {
        subject: Engine(subject, inputs[f"engine-{subject}"].file(ENGINE), job.backend.runner, job.backend.name)
        for subject in ("student", "teacher")
    }
    session = work / "session"
    found = benchmark(
        engines["student"], engines["teacher"], samples=job.images(0, len(labels)), labels=labels,
        device=Device(job.device or job.target.device, work), workdir=session, seconds=spec.seconds,
        launches=spec.launches, mode=spec.mode, seed=job.recipe.seed,
        on_progress=lambda share, left_s, text: job.on_progress(share, text),
    )  # fmt: skip
    for file in session.iterdir():
        if file.name != "samples.npy":  # the images can be made again from the data, and are large
            shutil.copy(file, out)
    np.save(out / LABELS, labels)
    return found


def _train(
    job: Job, network: nn.Module, spec: Train, method: Method, frozen: nn.Module | None, work: Path, cache: Path | None
) -> Trained:
    from edgekd import distill

    def on_progress(at: distill.Progress) -> None:
        newest = "val {val_accuracy:.1%}, loss {train_loss:.3f}".format(**at.metrics) if at.metrics else "first epoch"
        job.on_progress(at.done / at.total, newest)

    return distill.train(
        network, job.dataset, spec, method, teacher=frozen, augment=job.recipe.data.augment, seed=job.recipe.seed,
        work=work / "training", logits_cache=cache, on_progress=on_progress,
    )  # fmt: skip


def _network_result(
    job: Job, subject: str, network: nn.Module, trained: Trained | None, out: Path, work: Path
) -> dict[str, Any]:
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
    about = {"network": part.network, "options": part.options, "activation": part.activation}
    shape = {"shape": list(astuple(dataset.shape)), "num_classes": dataset.num_classes}
    networks.save_weights(network, out / WEIGHTS, {**about, **shape})
    x = dataset.normalize(dataset.val.images[: distill.evaluation_batch(dataset)])
    inputs = activations.input_histograms(network, torch.from_numpy(x).to(next(network.parameters()).device))
    curves = [curve | {"inputs": own} for curve, own in zip(activations.curves(network), inputs, strict=True)]
    (out / CURVES).write_text(json.dumps(curves), encoding="utf-8")
    result = {
        **_accuracy(logits, dataset.test.labels),
        "params": networks.count_params(network),
        "macs": networks.count_macs(network, dataset.shape),
        "size_bytes": (out / WEIGHTS).stat().st_size,
        "class_names": list(dataset.class_names),
        "notes": [*dataset.notes, *job.notes[subject]],
    }
    if trained is not None:
        unfinished = shutil.ignore_patterns(f"{distill.CHECKPOINT}*")
        shutil.copytree(work / "training", out / LOG, ignore=unfinished)
        result |= {"epochs": trained.epochs, "kept_epoch": trained.kept}
    return result


def _accuracy(logits: Array, labels: Array) -> dict[str, Any]:
    right = int((logits.argmax(1) == labels).sum())
    return {"top1": right / len(labels), "n": len(labels)}


def _metadata(job: Job, subject: str, artifact: Artifact) -> dict[str, Any]:
    """What a user of the ONNX file alone has to know; `Image.BitmapPixelFormat` is a key of the ONNX standard."""
    dataset, part = job.dataset, job.part(subject)
    recipe = json.dumps(artifact.manifest["spec"], sort_keys=True)  # the part of it that made this network
    return {
        "task": "image-classification",
        "class_names": list(dataset.class_names),
        "input_size": list(astuple(dataset.shape)),
        "input_layout": "NCHW",
        "preprocessing": "(pixel / 255 - mean) / std",
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "Image.BitmapPixelFormat": "Gray8" if dataset.shape.channels == 1 else "Rgb8",
        "edgekd.version": __version__,
        "edgekd.network": part.network,
        "edgekd.activation": part.activation,
        "edgekd.recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
    }


def _reference(model: Path, work: Path, threads: int) -> Callable[[Array], Array]:
    """ONNX Runtime on the CPU, which says what an ONNX file computes."""
    reference: Backend = registry.create("backend", "onnxruntime")
    folder = work / "reference"
    folder.mkdir(exist_ok=True)
    reference.compile(model, folder, threads=threads)
    engine = Engine("reference", folder, reference.runner, reference.name)
    run: Callable[[Array], Array] = backends.load_runner(engine).run
    return run


def _test_logits(job: Job, run: Callable[[Array], Array]) -> Array:
    """What an engine makes of the whole test split, float32 [N, K]."""
    size = 1 if job.recipe.export.batch == "static" else 100
    return np.concatenate([run(job.images(at, at + size)) for at in range(0, len(job.dataset.test), size)])


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextlib.contextmanager
def _warnings_of(name: str) -> Iterator[list[str]]:
    """The warnings that are logged under a name, kept from everybody else."""
    logger, texts = logging.getLogger(name), []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler, level, propagate = Keep(logging.WARNING), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)  # also when the user wants to see errors alone
    logger.propagate = False
    try:
        yield texts
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
