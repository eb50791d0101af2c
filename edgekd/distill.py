"""The training loop, for teacher and student alike, on one CPU, one GPU or many processes (accelerate).

A run that is killed at any moment and started again ends with the weights of a run that was not. Nothing that matters
lives outside the checkpoint, and little has to live in it: the order of the data, its augmentation, the learning rate
and the random numbers of every step are pure functions of seed, position and metrics. The checkpoint holds what is
left: position, metrics, weights, statistics and the optimiser's moments.

With several processes (`accelerate launch`), each takes `batch_size` samples a step and gradients are averaged. The
statistics of batch normalisation are those of each process's own samples; the first process's are evaluated and kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import accelerate.utils
import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import swa_utils

from edgekd.data import Dataset, Split
from edgekd.data.batches import Batch, Batches, evaluation_batches
from edgekd.errors import CheckpointError, MissingError, StageError
from edgekd.learning_rate import learning_rate
from edgekd.methods import Method, Step
from edgekd.recipe import Augment, Train
from edgekd.teacher_logits import TeacherLogits, is_changing

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
# A kill costs about this much training, and writing checkpoints next to nothing.
CHECKPOINT_SECONDS = 30.0
# After this many updates the processes compare notes; at every one of them a GPU would have to wait for the answer.
LOOK_EVERY = 20
# Evaluation takes as many images at a time as have this many values: 8 million float32 are 32 MB.
EVALUATION_VALUES, EVALUATION_BATCH = 8_000_000, 500


@dataclass(frozen=True)
class Progress:
    """Where the training stands: batches done of all, and the newest epoch's metrics (empty before the first)."""

    done: int
    total: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Trained:
    """What training made: the metrics of every epoch, and the epoch whose weights the network now has."""

    epochs: list[dict[str, float]]
    kept: int


def train(
    network: nn.Module,
    dataset: Dataset,
    spec: Train,
    method: Method,
    *,
    teacher: nn.Module | None = None,
    augment: Augment,
    seed: int,
    work: Path,
    logits_cache: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Trained:
    """Train `network` in place by `method`, resuming what `work` holds of an earlier, interrupted call.

    teacher: is frozen, and stays as it is; its logits are kept in the folder `logits_cache`, if one is given.
    torch's random state is set anew at every step.
    Raises StageError when the loss is no longer finite (the last good checkpoint stays) or when batch normalisation
    would see a single sample, CheckpointError for a damaged checkpoint.
    """
    run = _Run(network, dataset, spec, method, teacher, augment, seed, work, logits_cache)
    run.resume()
    while run.epoch < spec.epochs:
        for batch in run.batches.epoch(run.epoch, start=run.position):
            run.step(batch)
            on_progress(Progress(run.done, run.total, run.history[-1] if run.history else {}))
        run.end_epoch()
    return run.finish()


def predict(network: nn.Module, split: Split, dataset: Dataset) -> np.ndarray:
    """The network's logits for a split, float32 [N, K], in its order. Leaves the network's mode as it was."""
    device = next(network.parameters()).device
    size = max(1, min(EVALUATION_BATCH, EVALUATION_VALUES // split.images[0].size))
    was_training = network.training
    network.eval()
    # Nothing is rounded to TF32: this is what the exported graph is compared with.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits = [network(x).float().cpu() for x in evaluation_batches(split, dataset, batch_size=size, device=device)]
    network.train(was_training)
    return torch.cat(logits).numpy()


class _Learner(nn.Module):
    """Student and method as the one module that accelerate wraps: the processes average the gradients of both."""

    def __init__(self, student: nn.Module, method: Method) -> None:
        super().__init__()
        self.student, self.method = student, method

    def forward(self, batch: Batch, progress: float, teacher: Callable[[], Tensor] | None) -> dict[str, Tensor]:
        """The terms of the loss by name, and `accuracy` on the batch."""
        step = Step(batch.x, batch.y, progress=progress, student=self.student, teacher=teacher)
        terms: dict[str, Tensor] = self.method(step)
        return {**terms, "accuracy": (step.student_logits.detach().argmax(1) == batch.y).float().mean()}


class _Run:
    """The state of one training, and what happens to it: resume, step, end of epoch, finish."""

    def __init__(
        self, network: nn.Module, dataset: Dataset, spec: Train, method: Method, teacher: nn.Module | None,
        augment: Augment, seed: int, work: Path, logits_cache: Path | None,
    ) -> None:  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=False)  # teacher and student may differ in precision
        self.accelerator = accelerate.Accelerator(mixed_precision="no" if spec.precision == "fp32" else spec.precision)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.network, self.dataset, self.spec, self.seed, self.work = network, dataset, spec, seed, work
        self.device = self.accelerator.device
        self.batches = Batches(
            dataset.train, dataset, batch_size=spec.batch_size, augment=augment, seed=seed, device=self.device,
            rank=self.rank, world=self.world, channels_last=spec.channels_last,
        )  # fmt: skip
        _check_batch_norm(network, min(spec.batch_size, len(dataset.train) // self.world))
        self.total = spec.epochs * len(self.batches)
        self.updates = -(-len(self.batches) // spec.accumulate)  # an epoch
        network.to(self.device)
        if spec.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = _moving_average(network, spec.ema) if spec.ema else None
        self.teacher = None if teacher is None else teacher.to(self.device).requires_grad_(False)
        self.logits: TeacherLogits | None = None
        if self.teacher is not None and (logits_cache is not None or not is_changing(augment)):
            self.logits = TeacherLogits(self.teacher, dataset, self.batches, augment, self.accelerator, logits_cache)
        _seed_random(self.device, "method", seed)
        method.attach(network, self.teacher)
        self.method = method.to(self.device)
        learner = _Learner(torch.compile(network) if spec.compile else network, method)  # type: ignore[arg-type]
        self.model = self.accelerator.prepare(learner).train()
        self.optimizer = _optimizer(learner, spec)
        if self.teacher is not None:
            self.teacher.eval()
        self.epoch, self.position = 0, 0
        self.history: list[dict[str, float]] = []
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        self.sums: dict[str, Tensor] = {}
        self.saved_at = self.epoch_started = time.monotonic()
        self.board: Any = None

    @property
    def done(self) -> int:
        """Batches since the start of the training."""
        return self.epoch * len(self.batches) + self.position

    def step(self, batch: Batch) -> None:
        """One batch forward and back; the weights move when `accumulate` batches are together or the epoch ends."""
        accumulate = self.spec.accumulate
        first = self.position - self.position % accumulate
        together = min(accumulate, len(self.batches) - first)
        moves = self.position == first + together - 1
        teacher = None if self.teacher is None else lambda: self._teacher_logits(batch)
        _seed_random(self.device, "step", self.seed, self.rank, self.done)
        with contextlib.nullcontext() if moves else self.accelerator.no_sync(self.model):
            terms = self.model(batch, self.done / self.total, teacher)
            accuracy = terms.pop("accuracy")
            loss = torch.stack(list(terms.values())).sum()
            self.accelerator.backward(loss / together)
        self._account(loss, accuracy, terms)
        if moves:
            self._move(self.epoch * self.updates + self.position // accumulate)
        self.position += 1
        if moves and self.position // accumulate % LOOK_EVERY == 0:
            self._look()

    def _move(self, update: int) -> None:
        """One update of the weights, counted from 0."""
        if self.spec.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.spec.clip)
        accuracies = [metrics["val_accuracy"] for metrics in self.history]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec, update, self.spec.epochs * self.updates, accuracies)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.network)

    def _teacher_logits(self, batch: Batch) -> Tensor:
        if self.logits is not None:
            return self.logits.of(self.epoch)[batch.index]
        assert self.teacher is not None
        logits: Tensor = self.teacher(batch.x)
        return logits

    def _account(self, loss: Tensor, accuracy: Tensor, terms: Mapping[str, Tensor]) -> None:
        names = ["loss", "accuracy", *(f"loss_{name}" for name in terms)]
        values = torch.stack([loss, accuracy, *terms.values()]).detach()
        ...

    def _look(self) -> None:
        """Now and then, all processes together: stop when the loss is not finite, save when it is time."""

    def end_epoch(self) -> None:
        """Validate, remember the best weights, log, and save."""
