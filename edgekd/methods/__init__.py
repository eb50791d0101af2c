"""Distillation methods, one file each, behind the one contract that the training loop calls.

A method is a module: what it owns (projectors, embeddings) is trained with the student, saved in its checkpoints, and
left behind at export. The loop makes a `Step` for every batch and minimises the sum of the terms that the method
returns; it never asks which method it is. Random numbers come from torch's global state, which the loop sets at every
step: a training that is resumed draws the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


class Step:
    """One training batch as a method sees it. Logits are computed when first asked for, and once.

    x: [B, C, H, W] normalised images; y: [B] labels; progress: share of the training done, 0 to 1.
    """

    def __init__(
        self, x: Tensor, y: Tensor, *, progress: float, student: Forward, teacher: Callable[[], Tensor] | None = None
    ) -> None:
        self.x, self.y, self.progress = x, y, progress
        self._student, self._teacher = student, teacher

    @cached_property
    def student_logits(self) -> Tensor:
        """float32 [B, K], with gradient."""
        return self._student(self.x).float()

    @cached_property
    def teacher_logits(self) -> Tensor:
        """float32 [B, K], without gradient. Asked for by a method with `needs_teacher` only."""
        assert self._teacher is not None, "the pipeline gives a teacher to every method that needs one"
        with torch.no_grad():
            return self._teacher().float()


class Method(nn.Module):
    """A distillation method: options as keyword-only parameters of `__init__`, losses in `forward`."""

    needs_teacher: bool = True

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Prepare for these two networks, once, before training: taps, projectors. Most methods need nothing.

        The networks are not to become submodules: what a method owns is trained and saved with it.
        """

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The weighted terms of the loss by name, each a scalar; their sum is minimised."""
        raise NotImplementedError
