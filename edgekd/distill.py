"""The training loop, for teacher and student alike, on one CPU, one GPU or many processes (accelerate).

A run that is killed at any moment and started again ends with the weights of a run that was not. Nothing that matters
lives outside the checkpoint, and little has to live in it: the order of the data, its augmentation, the learning rate
and the random numbers of every step are pure functions of seed, position and metrics. The checkpoint holds what is
left: position, metrics, weights, statistics and the optimiser's moments.

With several processes (`accelerate launch`), each takes `batch_size` samples a step and gradients are averaged.
Buffers, such as the statistics of batch normalisation, are those of the first process's samples: before every update
the others take them over, as they do from a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import accelerate
import accelerate.utils
import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import swa_utils

from edgekd.checkpoint import read_checkpoint, write_checkpoint
from edgekd.data import Dataset, Split
from edgekd.data.batches import Batch, Batches, UnlabelledBatches, evaluation_batches
from edgekd.errors import StageError
from edgekd.learning_rate import learning_rate
from edgekd.methods import Method, Step
from edgekd.methods.attachment import attach, check_batch_norm, check_replays
from edgekd.methods.taps import answer
from edgekd.recipe import Augment, Train
from edgekd.teacher_logits import TeacherLogits, checked_logits, is_changing
from edgekd.training_log import TrainingLog

CHECKPOINT = "checkpoint.pt"
# A kill costs about this much training, and writing checkpoints next to nothing.
CHECKPOINT_SECONDS = 30.0
# After this many updates the processes compare notes; at every one of them a GPU would have to wait for the answer.
LOOK_EVERY = 20
# The target domain's images come in an order of their own, or they would be paired with those of the data.
TARGET_SEED = 1 << 32
# Of a table of the teacher's answers: above it the teacher is asked at every step. Maps have many answers.
TABLE_BYTES = 1 << 30
# Images evaluated at a time: at most so many, and so many values; 8 million float32 are 32 MB, their maps some GB.
EVALUATION_BATCH, EVALUATION_VALUES = 500, 8_000_000


@runtime_checkable
class FollowsTraining(Protocol):
    """A network that changes with its training: told, before every batch, which share of it is done."""

    def follow(self, progress: float) -> None:
        """progress: from 0 to 1. What it does must depend on nothing else, or a resumed run would differ."""


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
        for batch in run.batches.epoch(run.epoch, start=run.position, replays=run.replays):
            run.step(batch)
            on_progress(Progress(run.done, run.total, run.history[-1] if run.history else {}))
        run.end_epoch()
    return run.finish()


def predict(network: nn.Module, split: Split, dataset: Dataset) -> np.ndarray:
    """The network's answers for a split, float32 [N, ...], in its order. Leaves the network's mode as it was."""
    device = next(network.parameters()).device
    size = evaluation_batch(dataset)
    was_training = network.training
    network.eval()
    # Nothing is rounded to TF32: this is what the exported graph is compared with.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits = [network(x).float().cpu() for x in evaluation_batches(split, dataset, batch_size=size, device=device)]
    network.train(was_training)
    return torch.cat(logits).numpy()


def evaluation_batch(dataset: Dataset) -> int:
    """How many images are evaluated at a time: many small ones, few large ones."""
    values = max(math.prod(dataset.shape.dimensions), math.prod(dataset.outputs))
    return max(1, min(EVALUATION_BATCH, EVALUATION_VALUES // values))


def processes() -> accelerate.PartialState:
    """This process's device and its place among all; the first call connects them, on the CPU where there is no GPU."""
    asked_for = accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU")  # by `accelerate launch --cpu`
    return accelerate.PartialState(cpu=asked_for or not torch.accelerator.is_available())


class _Learner(nn.Module):
    """Student and method as the one module that accelerate wraps: the processes average the gradients of both."""

    def __init__(self, student: nn.Module, method: Method, dataset: Dataset) -> None:
        super().__init__()
        self.student, self.method = student, method
        self.task, self.outputs = dataset.task, dataset.outputs

    def forward(self, batch: Batch, progress: float, given: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and what is logged of it. given: the rest of what the step is made of."""
        step = Step(
            batch.x, batch.y, progress=progress, student=self.student, index=batch.index,
            student_taps=self.method.student_taps, teacher_taps=self.method.teacher_taps, task=self.task, **given,
        )  # fmt: skip
        if self.method.needs_images:
            checked_logits(step.student_logits, self.outputs, "student")
        # The networks' values may be rounded; what a method makes of their differences may not.
        with torch.autocast(batch.x.device.type, enabled=False):
            terms: dict[str, Tensor] = self.method(step)
        for name, value in self.method.scheduled(progress).items():
            step.record(name, value)
        loss = torch.stack(list(terms.values())).sum()
        logged = {"loss": loss}
        if self.method.needs_images:
            logged["score"] = self.task.batch_score(step.student_logits.detach(), batch.y)
        logged |= {f"loss_{name}": term for name, term in terms.items()} | step.recorded
        return loss, {name: value.detach() for name, value in logged.items()}


class _Run:
    """The state of one training, and what happens to it: resume, step, end of epoch, finish."""

    def __init__(
        self, network: nn.Module, dataset: Dataset, spec: Train, method: Method, teacher: nn.Module | None,
        augment: Augment, seed: int, work: Path, logits_cache: Path | None,
    ) -> None:  # fmt: skip
        processes()
        AcceleratorState._reset_state(reset_partial_state=False)  # teacher and student may differ in precision
        unused = accelerate.DistributedDataParallelKwargs(find_unused_parameters=not method.uses_all_parameters)
        self.accelerator = accelerate.Accelerator(
            mixed_precision="no" if spec.precision == "fp32" else spec.precision, kwargs_handlers=[unused]
        )
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.network, self.dataset, self.spec, self.seed, self.work = network, dataset, spec, seed, work
        self.batches = Batches(
            dataset.train, dataset, batch_size=spec.batch_size, augment=augment, seed=seed, device=self.device,
            rank=self.rank, world=self.accelerator.num_processes, channels_last=spec.channels_last,
        )  # fmt: skip
        self.target = None
        if method.needs_target and dataset.target is not None:
            self.target = UnlabelledBatches(
                dataset.target.images, dataset, batch_size=spec.batch_size, augment=augment, seed=seed + TARGET_SEED,
                device=self.device, rank=self.rank, world=self.accelerator.num_processes,
                channels_last=spec.channels_last,
            )  # fmt: skip
        self.total = spec.epochs * len(self.batches)
        self.updates = math.ceil(len(self.batches) / spec.accumulate)  # in an epoch
        network.to(self.device)
        if spec.channels_last:
            flat = not dataset.shape.depth
            network.to(memory_format=torch.channels_last if flat else torch.channels_last_3d)  # type: ignore[call-overload]
        self.ema = _moving_average(network, spec.ema) if spec.ema else None
        self.teacher = None if teacher is None else teacher.to(self.device).requires_grad_(False)
        _seed_random(self.device, "method", seed)
        attach(method, network, self.teacher, dataset, spec)
        self.method = method.to(self.device)
        smallest = min(spec.batch_size, len(dataset.train) // self.accelerator.num_processes)
        check_batch_norm(nn.ModuleList([network, method]), smallest)
        check_replays(method, len(self.batches))
        self.logits = None
        # A table holds logits alone: a teacher whose features are wanted has to compute.
        if (
            self.teacher is not None
            and not method.teacher_taps.paths
            and (logits_cache is not None or not is_changing(augment))
            and 4 * len(dataset.train) * math.prod(dataset.outputs) <= TABLE_BYTES
        ):
            self.logits = TeacherLogits(self.teacher, dataset, self.batches, augment, self.accelerator, logits_cache)
        student: Any = torch.compile(network) if spec.compile else network
        learner = _Learner(student, method, dataset)
        self.model = self.accelerator.prepare(learner).train()
        if self.teacher is not None:
            self.teacher.eval()
        self.adversaries = method.optimizers()
        self.optimizer = _optimizer(learner, spec, self.adversaries, together=method.uses_all_parameters)
        self.epoch, self.position = 0, 0
        self.history: list[dict[str, float]] = []
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        self.sums: dict[str, Tensor] = {}
        self.unseen: list[tuple[int, dict[str, Tensor]]] = []  # what was logged since the last look, by step
        self.saved_at = self.epoch_started = time.monotonic()
        self.log: TrainingLog | None = None

    @property
    def done(self) -> int:
        """Batches since the start of the training."""
        return self.epoch * len(self.batches) + self.position

    @property
    def replays(self) -> int:
        """How many steps in a row take the same batch in this epoch."""
        return self.method.replays_at(self.epoch / self.spec.epochs)

    def step(self, batch: Batch) -> None:
        """One batch forward and back; the weights move when `accumulate` batches are together or the epoch ends."""
        update, number = divmod(self.position, self.spec.accumulate)
        together = min(self.spec.accumulate, len(self.batches) - update * self.spec.accumulate)
        moves = number == together - 1
        given: dict[str, Any] = {"replay": self.position % self.replays}
        if self.teacher is not None:
            given |= {"teacher": lambda: self._teacher_logits(batch), "ask_teacher": self._ask_teacher}
        if self.target is not None:
            given["target"] = self.target[self.done]
        _seed_random(self.device, "step", self.seed, self.rank, self.done)
        if isinstance(self.network, FollowsTraining):
            self.network.follow(self.done / self.total)
        with contextlib.nullcontext() if moves else self.accelerator.no_sync(self.model):
            loss, logged = self.model(batch, self.done / self.total, given)
            self.accelerator.backward(loss / together)
        self.sums |= {name: self.sums.get(name, 0) + value for name, value in logged.items()}
        self.position += 1
        self.unseen.append((self.done, logged))
        if moves:
            self._move(self.epoch * self.updates + update)
            if (update + 1) % LOOK_EVERY == 0:
                self._look()

    def _teacher_logits(self, batch: Batch) -> Tensor:
        assert self.teacher is not None
        if self.logits is not None:
            return self.logits.of(self.epoch)[batch.index]
        with self.accelerator.autocast():
            return self._ask_teacher(batch.x)

    def _ask_teacher(self, x: Tensor) -> Tensor:
        assert self.teacher is not None
        return checked_logits(answer(self.teacher, x, "teacher"), self.dataset.outputs, "teacher")

    def _move(self, update: int) -> None:
        if self.spec.clip:
            for optimizer in (self.optimizer, *self.adversaries):  # an adversary's gradient shrinks its own steps alone
                moved = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                self.accelerator.clip_grad_norm_(moved, self.spec.clip)
        metric = self.dataset.task.metric
        gains = [metric.gain(metrics["val_score"]) for metrics in self.history if "val_score" in metrics]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec, update, self.spec.epochs * self.updates, gains)
        for optimizer in (self.optimizer, *self.adversaries):
            optimizer.step()
            optimizer.zero_grad()
        share = self.done / self.total
        self.method.constrain(self.network, step_size=self.optimizer.param_groups[0]["lr"], progress=share)
        if self.ema is not None:
            self.ema.update_parameters(self.network)
            self.method.constrain(self.ema.module, step_size=0.0, progress=share)

    def _look(self) -> None:
        """All processes together: stop when the loss is not finite, save when it is time."""
        self.sums = self.accelerator.reduce(self.sums, "mean")
        if wrong := _not_finite(self.sums):
            # Where it is another process's loss, this one knows no more than the sums.
            steps = [(f"at step {done}", names) for done, logged in self.unseen if (names := _not_finite(logged))]
            raise self._diverged(*[*steps, (f"by step {self.done}", wrong)][0])
        self.unseen.clear()
        # Between replays of a batch a method may hold what a resumed run could not: there is no checkpoint there.
        between = self.position % self.replays == 0
        if between and time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
            self._save()

    def end_epoch(self) -> None:
        """Validate, remember the best weights, log, and save."""
        self._look()
        network = self._evaluated()
        validated = {} if "val" in self.dataset.stand_ins else self._validate(network)
        metrics = {
            "epoch": self.epoch + 1,
            **{f"train_{name}": float(value) / len(self.batches) for name, value in self.sums.items()},
            **validated,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(time.monotonic() - self.epoch_started, 3),
        }
        self.history.append(metrics)
        self.epoch, self.position, self.sums, self.epoch_started = self.epoch + 1, 0, {}, time.monotonic()
        ready = self.epoch >= self.spec.epochs * self.method.ready
        if self.spec.keep == "best" and validated and ready:
            goodness = self.dataset.task.metric.goodness(validated["val_score"])
            if self.best is None or goodness >= self.best[0]:
                self.best = goodness, self.epoch, {name: value.clone() for name, value in network.state_dict().items()}
        if self.log is not None:
            self.log.add(metrics)
        if self.epoch == self.spec.epochs or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
            self._save()

    def _evaluated(self) -> nn.Module:
        """What is validated and kept: the network, or the moving average of its weights."""
        network: nn.Module = self.network if self.ema is None else self.ema.module
        for buffer in network.buffers():
            accelerate.utils.broadcast(buffer)  # since the last update, each process has added its own samples
        return network

    def _validate(self, network: nn.Module) -> dict[str, float]:
        """{val_score, val_loss} on the validation split; the processes share its images and exchange their answers."""
        val, task = self.dataset.val, self.dataset.task
        mine = np.arange(self.rank, len(val), self.accelerator.num_processes)
        outputs = torch.zeros(len(val), *self.dataset.outputs)
        if len(mine):
            outputs[mine] = torch.from_numpy(predict(network, val[mine], self.dataset))
        outputs = self.accelerator.reduce(outputs.to(self.device), "sum").cpu()
        loss = float(task.loss(outputs, torch.from_numpy(val.labels)))
        if not math.isfinite(loss):
            raise self._diverged(f"by step {self.done}", f"val_loss is {loss}")
        return {"val_score": task.score(outputs.numpy(), val.labels), "val_loss": loss}

    def _diverged(self, when: str, what: str) -> StageError:
        saved = f"the last good checkpoint stays in {self.work}", "no checkpoint was written before it"
        return StageError(
            f"the loss is not finite {when} of {self.total} (epoch {self.epoch + 1}): {what}",
            allowed=saved[0] if (self.work / CHECKPOINT).exists() else saved[1],
            fix="lower train.lr, set train.clip=1, or look for extreme values in the data",
        )

    def finish(self) -> Trained:
        """Give the network the weights that were kept."""
        if self.best is not None:
            self.network.load_state_dict(self.best[2])
        elif self.ema is not None:
            self.network.load_state_dict(self.ema.module.state_dict())
        self.network.eval()
        if self.log is not None:
            self.log.close()
        return Trained(self.history, self.best[1] if self.best is not None else self.epoch)

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        weights, owned = self.network.state_dict(), self.method.state_dict()
        # The loss may still be finite when the weights no longer are: the old checkpoint is the last good one then.
        good = all(value.isfinite().all() for value in (*weights.values(), *owned.values()))
        if not self.accelerator.is_main_process or not good:
            return
        state = {
            "epoch": self.epoch, "position": self.position, "seconds": time.monotonic() - self.epoch_started,
            "history": self.history, "best": self.best, "sums": self.sums, "network": weights,
            "method": owned, "optimizer": self.optimizer.state_dict(),
            "adversaries": [optimizer.state_dict() for optimizer in self.adversaries],
            "ema": None if self.ema is None else self.ema.state_dict(),
        }  # fmt: skip
        write_checkpoint(state, self.work / CHECKPOINT)

    def resume(self) -> None:
        """Go on from the checkpoint in `work`, if there is one."""
        file = self.work / CHECKPOINT
        if file.exists():
            self._restore(read_checkpoint(file))
        if self.accelerator.is_main_process:
            self.log = TrainingLog(self.work, self.history, tensorboard=self.spec.tensorboard)

    def _restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        for optimizer, saved in zip(self.adversaries, state["adversaries"], strict=True):
            optimizer.load_state_dict(saved)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.epoch, self.position, self.history = state["epoch"], state["position"], state["history"]
        self.best = state["best"]
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.epoch_started -= state["seconds"]


def _not_finite(values: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} is {float(value)}" for name, value in values.items() if not value.isfinite())


def _moving_average(network: nn.Module, decay: float) -> swa_utils.AveragedModel:
    return swa_utils.AveragedModel(network, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True)


def _optimizer(
    learner: nn.Module, spec: Train, others: Sequence[torch.optim.Optimizer], *, together: bool
) -> torch.optim.Optimizer:
    """For all parameters that no other optimiser has.

    One kernel for all: the loop over them in Python costs several times as much on a small network. torch's SGD has
    none for parameters that have not moved `together` from the start: some would have momentum, and some not yet.
    """
    taken = {id(parameter) for other in others for group in other.param_groups for parameter in group["params"]}
    parameters = [parameter for parameter in learner.parameters() if id(parameter) not in taken]
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov and spec.momentum > 0,
        weight_decay=spec.weight_decay, fused=together,
    )  # fmt: skip


def _seed_random(device: torch.device, *position: object) -> None:
    """Set torch's random state, of dropout say, by what it may depend on."""
    number = int.from_bytes(hashlib.sha256(repr(position).encode()).digest()[:8], "little", signed=True)
    torch.default_generator.manual_seed(number)  # not torch.manual_seed: it asks for every kind of device, in 0.15 ms
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)
