"""The training loop, for teacher and student alike, on one CPU, one GPU or many processes (accelerate).

A run that is killed at any moment and started again ends with the weights of a run that was not. So nothing that
matters is remembered outside the checkpoint: the order of the data and its augmentation are pure functions of seed,
epoch and sample, and the checkpoint holds the rest (weights, statistics, optimiser, schedule, random state, position).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import swa_utils

from edgekd.data import Dataset, Split
from edgekd.data.batches import Batch, Batches, evaluation_batches
from edgekd.errors import MissingError, StageError
from edgekd.methods import Method, Step
from edgekd.recipe import Augment, Train

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
# Long epochs are saved on the way too: a kill costs at most about this much training.
CHECKPOINT_SECONDS = 60.0
# NaN is looked for this often: asking at every step would make a GPU wait for the answer.
CHECK_EVERY = 20


@dataclass(frozen=True)
class Progress:
    """Where the training stands: steps done of all, and the newest epoch's metrics (empty before the first)."""

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

    teacher: frozen; its logits come from `logits_cache` when a folder is given, which students may share.
    Raises StageError when the loss is no longer finite; the last good checkpoint stays.
    """
    run = _Run(network, dataset, spec, method, teacher, augment, seed, work, logits_cache)
    run.resume()
    while run.epoch < spec.epochs:
        for batch in run.batches.epoch(run.epoch, start=run.position):
            run.step(batch)
            on_progress(Progress(run.done, run.total, run.history[-1] if run.history else {}))
        run.end_epoch()
    return run.finish()


def predict(network: nn.Module, split: Split, dataset: Dataset, *, batch_size: int = 500) -> np.ndarray:
    """The network's logits for a split, float32 [N, K], in its order. Leaves the network's mode as it was."""
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    with torch.no_grad():
        logits = [network(x).float().cpu() for x in evaluation_batches(split, dataset, batch_size=batch_size, device=device)]
    network.train(was_training)
    return torch.cat(logits).numpy()


class _Run:
    """The state of one training, and the four things that happen to it: resume, step, end of epoch, finish."""

    def __init__(
        self, network: nn.Module, dataset: Dataset, spec: Train, method: Method, teacher: nn.Module | None,
        augment: Augment, seed: int, work: Path, logits_cache: Path | None,
    ) -> None:  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=False)  # teacher and student may differ in precision
        self.accelerator = accelerate.Accelerator(mixed_precision="no" if spec.precision == "fp32" else spec.precision)
        self.network, self.dataset, self.spec, self.method, self.work = network, dataset, spec, method, work
        device = self.accelerator.device
        if spec.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network.to(device)
        self.teacher = teacher.to(device).eval().requires_grad_(False) if teacher is not None else None
        torch.manual_seed(seed)  # dropout, and what the method makes of its own
        method.attach(network, self.teacher)
        method.to(device)
        self.batches = Batches(
            dataset.train, dataset, batch_size=spec.batch_size, augment=augment, seed=seed, device=device,
            rank=self.accelerator.process_index, world=self.accelerator.num_processes, channels_last=spec.channels_last,
        )  # fmt: skip
        self.total = spec.epochs * len(self.batches)
        self.optimizer = _optimizer(network, method, spec)
        self.model, self.prepared = self._prepare()
        self.schedule = _schedule(self.optimizer, spec, max(1, self.total // spec.accumulate))
        self.ema = (
            swa_utils.AveragedModel(network, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(spec.ema), use_buffers=True)
            if spec.ema
            else None
        )
        self.logits = _TeacherLogits(logits_cache, self.teacher, self.batches) if logits_cache and self.teacher else None
        self.epoch, self.position, self.done = 0, 0, 0
        self.history: list[dict[str, float]] = []
        self.best: tuple[float, int, dict[str, Tensor]] | None = None
        self.sums: dict[str, Tensor] = {}
        self.saved_at = self.epoch_started = time.monotonic()
        self.board = _tensorboard(work) if spec.tensorboard and self.accelerator.is_main_process else None

    def _prepare(self) -> tuple[nn.Module, Any]:
        model = torch.compile(self.network) if self.spec.compile else self.network
        model, optimizer = self.accelerator.prepare(model, self.optimizer)
        return model, optimizer

    def step(self, batch: Batch) -> None:
        """One batch forward and back; the weights move after every `accumulate` batches."""
        self.model.train()
        self.method.train()
        step = Step(
            batch.x, batch.y, progress=self.done / self.total, student=self.model,
            teacher=None if self.teacher is None else lambda: self._teacher_logits(batch),
        )  # fmt: skip
        terms = self.method(step)
        loss = torch.stack(list(terms.values())).sum()
        self.position += 1
        self.done += 1
        moves = self.done % self.spec.accumulate == 0 or self.position == len(self.batches)
        sync = self.accelerator.no_sync(self.model) if not moves else contextlib.nullcontext()
        with sync:
            self.accelerator.backward(loss / self.spec.accumulate)
        if moves:
            if self.spec.clip:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.spec.clip)
            self.prepared.step()
            self.prepared.zero_grad()
            if isinstance(self.schedule, torch.optim.lr_scheduler.LambdaLR):
                self.schedule.step()
            if self.ema is not None:
                self.ema.update_parameters(self.network)
        self._account(terms, loss, (step.student_logits.argmax(1) == batch.y).float().mean())
        if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
            self.save()

    def _teacher_logits(self, batch: Batch) -> Tensor:
        assert self.teacher is not None
        if self.logits is not None:
            return self.logits.of(self.epoch)[batch.index]
        with self.accelerator.autocast():
            logits: Tensor = self.teacher(batch.x)
        return logits.float()

    def _account(self, terms: dict[str, Tensor], loss: Tensor, accuracy: Tensor) -> None:
        named = {"loss": loss, "accuracy": accuracy, **{f"loss_{name}": term for name, term in terms.items()}}
        for name, value in named.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        if (self.done % CHECK_EVERY == 0 or self.position == len(self.batches)) and not self.sums["loss"].isfinite():
            bad = [name for name in terms if not self.sums[f"loss_{name}"].isfinite()]
            raise StageError(
                f"the loss is not finite at step {self.done} of {self.total} (epoch {self.epoch + 1}), term: {', '.join(bad)}",
                allowed=f"the last good checkpoint is kept in {self.work}",
                fix="lower train.lr, set train.clip=1, or look for extreme values in the data",
            )

    def end_epoch(self) -> None:
        """Validate, remember the best weights, log, and save."""
        state = self.ema.module if self.ema is not None else self.network
        logits = predict(state, self.dataset.val, self.dataset)
        labels = self.dataset.val.labels
        sums = {name: self.accelerator.reduce(value, "mean") for name, value in self.sums.items()}
        means = {f"train_{name}": float(value) / len(self.batches) for name, value in sums.items()}
        accuracy = float((logits.argmax(1) == labels).mean())
        metrics = {
            "epoch": self.epoch + 1,
            **means,
            "val_accuracy": accuracy,
            "val_loss": float(nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(time.monotonic() - self.epoch_started, 3),
        }
        if self.best is None or accuracy >= self.best[0] or self.spec.keep == "last":
            self.best = accuracy, self.epoch + 1, copy.deepcopy(state.state_dict())
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(accuracy)
        self.history.append(metrics)
        self.epoch, self.position, self.sums = self.epoch + 1, 0, {}
        self.epoch_started = time.monotonic()
        self.save()
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, self.epoch)

    def finish(self) -> Trained:
        """Give the network the weights that were kept."""
        assert self.best is not None
        self.network.load_state_dict(self.best[2])
        self.network.eval()
        if self.board is not None:
            self.board.close()
        return Trained(self.history, self.best[1])

    def save(self) -> None:
        """Write the checkpoint so that a kill leaves either the old one or the new one."""
        self.saved_at = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        self.work.mkdir(parents=True, exist_ok=True)
        state = {
            "epoch": self.epoch, "position": self.position, "done": self.done, "history": self.history,
            "best": self.best, "sums": self.sums, "network": self.network.state_dict(), "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None, "rng": _rng_state(),
        }  # fmt: skip
        partial = self.work / f"{CHECKPOINT}.partial"
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.work / CHECKPOINT)
        lines = "".join(json.dumps(metrics) + "\n" for metrics in self.history)
        (self.work / METRICS).write_text(lines, encoding="utf-8")

    def resume(self) -> None:
        """Go on from the checkpoint in `work`, if there is one."""
        file = self.work / CHECKPOINT
        if not file.exists():
            return
        state = torch.load(file, map_location=self.accelerator.device, weights_only=True)
        self.epoch, self.position, self.done = state["epoch"], state["position"], state["done"]
        self.history, self.best, self.sums = state["history"], state["best"], state["sums"]
        self.network.load_state_dict(state["network"])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        _set_rng_state(state["rng"])


class _TeacherLogits:
    """The teacher's logits by epoch and sample, computed once and kept on disk: students that share it only read.

    Exact, because a sample's augmentation depends on nothing but the augmentation's seed, the epoch and the sample.
    """

    def __init__(self, folder: Path, teacher: nn.Module, batches: Batches) -> None:
        self.folder, self.teacher, self.batches = folder, teacher, batches
        self.epoch, self.logits = -1, torch.empty(0)

    def of(self, epoch: int) -> Tensor:
        """[N, K] for the whole training split as augmented in this epoch."""
        if epoch != self.epoch:
            file = self.folder / f"epoch_{epoch:04d}.npy"
            if not file.exists():
                self._compute(epoch, file)
            self.logits = torch.from_numpy(np.load(file, allow_pickle=False)).to(self.batches.device)
            self.epoch = epoch
        return self.logits

    def _compute(self, epoch: int, file: Path) -> None:
        with torch.no_grad():
            logits = torch.cat([self.teacher(x).float().cpu() for x in self.batches.in_order(epoch)])
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as handle:
            np.save(handle, logits.numpy())
        partial.replace(file)


def _optimizer(network: nn.Module, method: Method, spec: Train) -> torch.optim.Optimizer:
    parameters = [*network.parameters(), *method.parameters()]
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay)
    return torch.optim.SGD(
        parameters, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov and spec.momentum > 0,
        weight_decay=spec.weight_decay,
    )  # fmt: skip


def _schedule(
    optimizer: torch.optim.Optimizer, spec: Train, steps: int
) -> torch.optim.lr_scheduler.LambdaLR | torch.optim.lr_scheduler.ReduceLROnPlateau:
    if spec.schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=spec.gamma, patience=spec.patience, threshold=0.001, threshold_mode="abs"
        )
    warmup = steps * spec.warmup / spec.epochs

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = (step - warmup) / max(1.0, steps - warmup)
        if spec.schedule == "cosine":
            return 0.5 * (1 + float(np.cos(np.pi * min(1.0, share))))
        if spec.schedule == "step":
            return spec.gamma ** sum(step >= milestone * steps for milestone in spec.milestones)
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _rng_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingError("train.tensorboard needs tensorboard", fix="pip install 'edgekd[tensorboard]'") from error
    return SummaryWriter(str(folder / "tensorboard"))
