"""What each stage makes. A stage is a function of the job, its input artifacts and two folders: the artifact to fill,
and scratch that survives a kill. It returns the result that goes into the manifest.

torch is imported inside the stages that train or export: planning and reporting work without it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
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
from edgekd.errors import StageError
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
# Inputs of an activation are counted over this many validation images.
CURVE_SAMPLES = 500

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

    @functools.cached_property
    def dataset(self) -> Dataset:
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
        return networks.build(
            part.network, part.options, self.dataset.shape, self.dataset.num_classes, activation, self.recipe.seed
        )

    def restore(self, subject: str, artifact: Artifact) -> nn.Module:
        """The recipe's teacher or student with the weights that a stage made."""
        from edgekd import networks

        network = self.build(subject)
        networks.load_weights(network, artifact.file(WEIGHTS))
        return network.eval()

    def method(self) -> Method:
        """The recipe's distillation method."""
        made: Method = registry.create("method", self.recipe.distill.method, options=self.recipe.distill.options, where="distill")
        return made


def teacher(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Train the teacher, or load the user's checkpoint; and measure it."""
    from edgekd import networks

    network = job.build("teacher")
    spec = job.recipe.teacher
    if spec.checkpoint is None:
        trained = _train(job, network, spec.train, registry.create("method", "scratch"), None, work)
        return _network_result(job, "teacher", network, trained, out, work)
    networks.load_weights(network, spec.checkpoint)
    return _network_result(job, "teacher", network, None, out, work)


def scratch(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Train the student's network without the teacher, on the student's budget: the baseline."""
    network = job.build("student")
    trained = _train(job, network, job.recipe.distill.train, registry.create("method", "scratch"), None, work)
    return _network_result(job, "student", network, trained, out, work)


def student(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Distill the teacher into the student; and measure it."""
    network = job.build("student")
    method = job.method()
    frozen = job.restore("teacher", inputs["teacher"]) if method.needs_teacher else None
    cache = None
    if frozen is not None and job.recipe.distill.cache_teacher:
        cache = job.store.cache("teacher-logits", [inputs["teacher"].digest, job.recipe.data.model_dump(), job.fingerprint])
    trained = _train(job, network, job.recipe.distill.train, method, frozen, work, cache)
    return _network_result(job, "student", network, trained, out, work)


def onnx(subject: str, job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Export a network, and compare it with torch on real samples and with ONNX Runtime on the whole test set."""
    from edgekd import export

    spec = job.recipe.export
    network = job.restore(subject, inputs[subject])
    images = job.dataset.normalized("test")
    job.on_progress(0.1, "exporting")
    result = export.export(
        network, out / MODEL, example=images[:1], opset=spec.opset or job.target.opset, dynamic_batch=spec.batch == "dynamic",
        form=job.form(subject), metadata=_metadata(job, subject),
    )  # fmt: skip
    job.on_progress(0.5, "comparing with torch")
    logits = _in_batches(_reference(out / MODEL, work), images, spec.batch)
    expected = np.load(inputs[subject].file(LOGITS))
    parity = export.parity(expected, logits)
    parity.check(spec.tolerance, f"{subject}.onnx")
    np.save(out / LOGITS, logits)
    return {**result, "parity": parity.as_dict(), **_accuracy(logits, job.dataset.test.labels)}


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
        logits = _in_batches(run, job.dataset.normalized("test"), job.recipe.export.batch)
        np.save(out / LOGITS, logits)
        result |= _accuracy(logits, job.dataset.test.labels)
    return result


def bench(job: Job, inputs: Inputs, out: Path, work: Path) -> dict[str, Any]:
    """Deploy both engines to the device and measure them there, interleaved, for speed and accuracy."""
    spec = job.recipe.benchmark
    some = spec.accuracy_samples
    labels = job.dataset.test.labels[:some]
    engines = {
        subject: Engine(subject, inputs[f"engine-{subject}"].file(ENGINE), job.backend.runner, job.backend.name)
        for subject in ("student", "teacher")
    }
    session = work / "session"
    found = benchmark(
        engines["student"], engines["teacher"], samples=job.dataset.normalized("test")[:some], labels=labels,
        device=Device(job.device or job.target.device, work), workdir=session, seconds=spec.seconds,
        launches=spec.launches, mode=spec.mode, seed=job.recipe.seed, on_progress=lambda share, left_s, text: job.on_progress(share, text),
    )  # fmt: skip
    for file in session.iterdir():
        if file.name != "samples.npy":  # the images can be made again from the data, and are large
            shutil.copy(file, out)
    np.save(out / LABELS, labels)
    return found


def _train(
    job: Job, network: nn.Module, spec: Train, method: Method, frozen: nn.Module | None, work: Path, cache: Path | None = None
) -> Trained:
    from edgekd import distill

    def on_progress(at: distill.Progress) -> None:
        newest = f"val {at.metrics['val_accuracy']:.1%}, loss {at.metrics['train_loss']:.3f}" if at.metrics else "first epoch"
        job.on_progress(at.done / at.total, newest)

    return distill.train(
        network, job.dataset, spec, method, teacher=frozen, augment=job.recipe.data.augment, seed=job.recipe.seed,
        work=work / "training", logits_cache=cache, on_progress=on_progress,
    )  # fmt: skip


def _network_result(job: Job, subject: str, network: nn.Module, trained: Trained | None, out: Path, work: Path) -> dict[str, Any]:
    """Measure a network on the test split, once, and write what the stages below it read."""
    import torch

    from edgekd import activations, distill, networks

    job.on_progress(1.0, "measuring on the test set")
    test = job.dataset.test
    logits = distill.predict(network, test, job.dataset)
    np.save(out / LOGITS, logits)
    np.save(out / LABELS, test.labels)
    part = job.part(subject)
    networks.save_weights(network, out / WEIGHTS, {"network": part.network, "options": part.options, "activation": part.activation})
    x = torch.from_numpy(job.dataset.normalize(job.dataset.val.images[:CURVE_SAMPLES])).to(next(network.parameters()).device)
    layers = zip(activations.curves(network), activations.input_histograms(network, x), strict=True)
    (out / CURVES).write_text(json.dumps([curve | {"inputs": inputs} for curve, inputs in layers]), encoding="utf-8")
    result = {
        **_accuracy(logits, test.labels),
        "params": networks.count_params(network),
        "macs": networks.count_macs(network, job.dataset.shape),
        "size_bytes": (out / WEIGHTS).stat().st_size,
        "class_names": list(job.dataset.class_names),
        "notes": list(job.dataset.notes),
    }
    if trained is not None:
        shutil.copytree(work / "training", out / LOG, ignore=shutil.ignore_patterns(distill.CHECKPOINT))
        result |= {"epochs": trained.epochs, "kept_epoch": trained.kept}
    return result


def _accuracy(logits: Array, labels: Array) -> dict[str, Any]:
    right = int((logits.argmax(1) == labels).sum())
    return {"top1": right / len(labels), "n": len(labels)}


def _metadata(job: Job, subject: str) -> dict[str, Any]:
    """What a user of the ONNX file alone has to know."""
    dataset, part = job.dataset, job.part(subject)
    recipe = json.dumps(job.recipe.model_dump(mode="json"), sort_keys=True)
    return {
        "edgekd.version": __version__,
        "edgekd.network": part.network,
        "edgekd.activation": part.activation,
        "edgekd.recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
        "class_names": list(dataset.class_names),
        "input": {"layout": "NCHW", "dtype": "float32", "shape": list(astuple(dataset.shape)), "scale": "pixel / 255"},
        "mean": list(dataset.mean),
        "std": list(dataset.std),
    }


def _reference(model: Path, work: Path) -> Callable[[Array], Array]:
    """ONNX Runtime on the CPU, which says what an ONNX file computes."""
    reference: Backend = registry.create("backend", "onnxruntime")
    folder = work / "reference"
    folder.mkdir(exist_ok=True)
    reference.compile(model, folder, threads=os.cpu_count() or 1)
    run: Callable[[Array], Array] = backends.load_runner(Engine("reference", folder, reference.runner, reference.name)).run
    return run


def _in_batches(run: Callable[[Array], Array], images: Array, batch: str) -> Array:
    size = 1 if batch == "static" else 100
    return np.concatenate([run(images[at : at + size]) for at in range(0, len(images), size)])


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
