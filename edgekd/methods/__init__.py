"""Distillation methods, one file each, behind the one contract that the training loop calls.

A method is a module: what it owns (projectors, embeddings) is trained with the student, saved in its checkpoints, and
left behind at export. The loop makes a `Step` for every batch and minimises the sum of the terms that the method
returns; it never asks which method it is. Random numbers come from torch's global state, which the loop sets at every
step: a training that is resumed draws the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from edgekd.methods.taps import NO_TAPS, Taps
from edgekd.schedule import is_schedule, value_at
from edgekd.tasks import Task
from edgekd.tasks.classification import Classification

Forward = Callable[[Tensor], Tensor]
CLASSIFICATION = Classification()


@dataclass(frozen=True, eq=False)
class Setting:
    """What a method may know of the training before it begins.

    example: float32 [B, C, H, W], two training images or more, normalised, on the networks' device; images(n): n of
    them, from all over the split, or all there are. labels: [N, ...] of all training samples, for the task. mean, std:
    [C, 1, 1], what the images were normalised with, on the 0..1 scale.
    """

    example: Tensor
    labels: Tensor
    num_classes: int
    mean: Tensor
    std: Tensor
    epochs: int
    images: Callable[[int], Tensor]
    task: Task = CLASSIFICATION


class Step:
    """One training batch as a method sees it. Networks compute when first asked, and once: logits and taps together.

    x: [B, C, H, W] normalised images; y: [B, ...] labels; index: [B], their places in the training split; progress:
    share of the training done, 0 to 1. replay: how often this batch was taken before, see `Method.replays`. student:
    the student, for whoever has other images for it.
    """

    def __init__(
        self, x: Tensor, y: Tensor, *, progress: float, student: Forward, teacher: Callable[[], Tensor] | None = None,
        ask_teacher: Forward | None = None, index: Tensor | None = None, student_taps: Taps = NO_TAPS,
        teacher_taps: Taps = NO_TAPS, replay: int = 0, task: Task = CLASSIFICATION, target: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.x, self.y, self.progress, self.student, self.replay = x, y, progress, student, replay
        self.task, self._target = task, target
        self._teacher, self._ask_teacher, self._index = teacher, ask_teacher, index
        self._student_taps, self._teacher_taps = student_taps, teacher_taps
        self.recorded: dict[str, Tensor] = {}

    @property
    def index(self) -> Tensor:
        """int64 [B]: which samples of the training split these are."""
        assert self._index is not None, "the training loop knows which samples it takes"
        return self._index

    @property
    def target(self) -> Tensor:
        """Images of the target domain, normalised, [T, C, H, W]. Asked for by a method with `needs_target` only."""
        assert self._target is not None, "the training loop gives them to every method that needs them"
        return self._target

    def label_loss(self) -> Tensor:
        """What the task minimises without a teacher, on these labels: a scalar."""
        return self.task.loss(self.student_logits, self.y)

    @property
    def student_logits(self) -> Tensor:
        """float32 [B, K], with gradient; or whatever the task has for answers."""
        return self._student_outputs[0]

    @property
    def student_features(self) -> dict[str, Tensor]:
        """float32, with gradient, by the paths of the method's `student_taps`."""
        return self._student_outputs[1]

    @property
    def teacher_logits(self) -> Tensor:
        """float32 [B, K], without gradient. Asked for by a method with `needs_teacher` only."""
        return self._teacher_outputs[0]

    @property
    def teacher_features(self) -> dict[str, Tensor]:
        """float32, without gradient, by the paths of the method's `teacher_taps`."""
        return self._teacher_outputs[1]

    def ask_teacher(self, x: Tensor) -> Tensor:
        """The teacher's logits for other images [B, C, H, W]: float32 [B, K]; the images may get a gradient, not it."""
        assert self._ask_teacher is not None, "the training loop gives a teacher to every method that needs one"
        return self._ask_teacher(x).float()

    def at(self, progress: float) -> Step:
        """The same batch, networks and record at another share of the training."""
        step = copy.copy(self)
        step.progress = progress
        return step

    def record(self, name: str, value: float | Tensor) -> None:
        """Put a number into the training log, beside the terms of the loss; the epoch's mean is shown."""
        self.recorded[name] = torch.as_tensor(value, dtype=torch.float32, device=self.x.device).detach()

    @cached_property
    def _student_outputs(self) -> tuple[Tensor, dict[str, Tensor]]:
        with self._student_taps.recording() as features:
            return self.student(self.x).float(), features

    @cached_property
    def _teacher_outputs(self) -> tuple[Tensor, dict[str, Tensor]]:
        assert self._teacher is not None, "the training loop gives a teacher to every method that needs one"
        with torch.no_grad(), self._teacher_taps.recording() as features:
            return self._teacher().float(), features


class Method(nn.Module):
    """A distillation method: options as keyword-only parameters of `__init__`, losses in `forward`.

    tasks: the names of those that it can learn; None for any.
    student_taps, teacher_taps: set by `attach` where features are needed; the steps then have them.
    needs_target: whether it learns from unlabelled images of a target domain.
    needs_modules: whether it has to find modules inside of the student; who taps them need not say so.
    needs_images: whether it learns from the data's images; without, the student is not asked about them.
    uses_all_parameters: whether every step gives a gradient to all that the method owns.
    replays: how many steps in a row take the same batch. An epoch has as many steps as ever, on fewer samples.
    """

    tasks: tuple[str, ...] | None = ("classification",)
    needs_teacher: bool = True
    needs_target: bool = False
    needs_modules: bool = False
    needs_images: bool = True
    uses_all_parameters: bool = True
    replays: int = 1
    student_taps: Taps = NO_TAPS
    teacher_taps: Taps = NO_TAPS

    @property
    def ready(self) -> float:
        """From which share of the training on the student is one to keep, as far as `constrain` knows by now."""
        return 0.0

    def replays_at(self, progress: float) -> int:
        """`replays` in the epoch that begins at this share of the training."""
        del progress
        return self.replays

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Prepare for these two networks, once, before training: taps, projectors. Most methods need nothing.

        The networks are not to become submodules: what a method owns is trained and saved with it.
        """

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimisers of its own, for parameters that play against the student; called once, after `attach`.

        The loop moves all other parameters, and calls these whenever it does. Their learning rates are their own.
        """
        return []

    def constrain(self, student: nn.Module, *, step_size: float, progress: float) -> None:
        """Change the student's weights in place after each update of them: proximal steps, projections onto a set.

        step_size: the update's learning rate. progress: the share of the training that is done with this update. It is
        called in every process, whose students are alike and have to stay so; and for the moving average of the
        weights, which belongs to the same set but has made no step: with a step_size of 0. What it remembers belongs
        into buffers.
        """

    def scheduled(self, progress: float) -> dict[str, float]:
        """The options that change while the student is trained, as they are now; they go into the training log."""
        options = vars(self).items()
        return {name: value_at(value, progress) for name, value in options if name[0] != "_" and is_schedule(value)}

    def finetuning(self) -> Method:
        """What trains a student on, for a quantizer, that this method has made: the same, unless that changes it."""
        return self

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The weighted terms of the loss by name, each a scalar; their sum is minimised."""
        raise NotImplementedError
