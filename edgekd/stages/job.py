"""The job that all stages work on: a recipe, a target, a store; and the names of the files that stages leave."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekd import data, registry
from edgekd.artifact import Artifact, Store
from edgekd.backends import Backend
from edgekd.data import Dataset
from edgekd.data import calibration as calibrations
from edgekd.device import Device
from edgekd.recipe import Choice, Network, Recipe, choice_from_yaml
from edgekd.target import Target
from edgekd.tasks import Task

if TYPE_CHECKING:
    from torch import nn

    from edgekd.bench.modes import Mode
    from edgekd.methods import Method
    from edgekd.quantize.quantizers import Quantizer

WEIGHTS = "weights.safetensors"
LOGITS = "test_logits.npy"
LABELS = "test_labels.npy"
CURVES = "activations.json"
MODEL = "model.onnx"
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
    # The jobs of the boards that a spread student is measured on, by their names in reports; part 0 goes to the first.
    boards: Mapping[str, Job] = field(default_factory=dict)
    on_progress: OnProgress = field(default=lambda share, text: None)
    # What building a network had to leave as it was, by teacher and student.
    notes: dict[str, list[str]] = field(default_factory=dict)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data, read when first asked for."""
        spec = self.recipe.data
        self.on_progress(0.0, "reading the data")
        dataset = data.load(
            spec.source, spec.options, task=spec.task, validation=spec.validation, seed=spec.seed,
            train_limit=spec.train_limit, test_limit=spec.test_limit,
            normalize=spec.normalize.model_dump() if spec.normalize else None,
        )  # fmt: skip
        return (
            dataset if spec.target_domain is None else data.with_target(dataset, *choice_from_yaml(spec.target_domain))
        )

    @property
    def task(self) -> Task:
        """What the data asks for."""
        return self.dataset.task

    @functools.cached_property
    def fingerprint(self) -> str:
        """The data's identity, known without decoding it."""
        return data.fingerprint(self.recipe.data.source, self.recipe.data.options)

    @property
    def has_images(self) -> bool:
        """Whether the recipe has images to learn from; known without reading them."""
        return self.recipe.data.source != "none"

    @property
    def has_baseline(self) -> bool:
        """Whether the student is also trained without the teacher."""
        return self.recipe.distill.scratch and self.has_images

    @property
    def has_test(self) -> bool:
        """Whether it has labelled test images."""
        return self.has_images or self.recipe.data.options["test"] is not None

    @property
    def subjects(self) -> tuple[str, ...]:
        """The networks that are made, deployed and measured: the student, and the teacher where the recipe names one.

        Stages, benchmark, kit and report follow from this; what compares the two needs both.
        """
        return ("student",) if self.recipe.teacher is None else ("student", "teacher")

    @property
    def choice(self) -> Choice:
        """The target's preferred backend."""
        return self.target.choices[0]

    @functools.cached_property
    def backend(self) -> Backend:
        """What compiles for the target."""
        made: Backend = registry.create("backend", self.choice.name, options=self.choice.options)
        return made

    @property
    def has_device(self) -> bool:
        """Whether there is something to measure on: this machine is a device, a board must be named."""
        return bool(self.device) or self.target.board is None or self.target.device != "local:"

    def open_device(self) -> Device:
        """The device; not yet connected."""
        return Device(self.device or self.target.device, self.store.root / "work" / "local")

    def part(self, subject: str) -> Network:
        """The recipe's section for `teacher` or `student`."""
        part = self.recipe.teacher if subject == "teacher" else self.recipe.student
        assert part is not None, "one of the job's subjects"
        return part

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
        shape, (num_outputs, *maps) = self.dataset.shape, self.dataset.outputs
        with warnings_of("edgekd.networks") as notes:
            network = networks.build(
                part.network, part.options, shape, num_outputs, activation, self.recipe.seed, maps=tuple(maps)
            )
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

    def measured(self, logits: Array) -> dict[str, Any]:
        """The score of answers for the whole test split, and what it is, as manifests hold it; no score for noise."""
        score = self.task.measured(logits, self.dataset.test.labels) if self.has_test else {}
        return score | self.task.described()

    def images(self, start: int, end: int) -> Array:
        """Test images as a network is fed them: float32 [N, C, H, W]."""
        return self.dataset.normalize(self.dataset.test.images[start:end])

    def method(self, *, finetuning: bool = False) -> Method:
        """The recipe's distillation method; `finetuning`: as it trains a student on that it has made."""
        spec = self.recipe.distill
        made: Method = registry.create("method", spec.method, options=spec.options, where="distill")
        return made.finetuning() if finetuning else made

    def quantizer(self) -> Quantizer:
        """What makes the student smaller than float32."""
        spec = self.recipe.quantize
        made: Quantizer = registry.create("quantizer", spec.method, options=spec.options, where="quantize")
        return made

    def mode(self) -> Mode:
        """How the engines are asked on the device."""
        spec = self.recipe.benchmark
        made: Mode = registry.create("mode", spec.mode, options=spec.options, where="benchmark")
        return made

    @functools.cached_property
    def calibration(self) -> calibrations.Calibration:
        """The images that a quantizer may look at."""
        spec = self.recipe.quantize
        options = self.recipe.data.options
        return calibrations.of(
            self.dataset, spec.calibration, options, n=spec.calibration_images, seed=spec.calibration_seed
        )


@contextlib.contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
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


def test_logits(job: Job, run: Callable[[Array], Array]) -> Array:
    """What an engine makes of the whole test split, float32 [N, ...]."""
    size = 1 if job.recipe.export.batch == "static" else 100
    return np.concatenate([run(job.images(at, at + size)) for at in range(0, len(job.dataset.test), size)])
