"""A teacher's logits for the whole training split, computed once and not at every step."""

from __future__ import annotations

import os
from pathlib import Path

import accelerate
import numpy as np
import torch
from torch import Tensor, nn

from edgekd.data import Dataset
from edgekd.data.batches import Batches
from edgekd.errors import RecipeError
from edgekd.methods.taps import answer
from edgekd.recipe import Augment


class TeacherLogits:
    """The teacher's logits by epoch and sample; kept in `folder`, if one is given, for every student that shares it.

    They are those of the images that the student sees, since a sample's augmentation depends on nothing but the
    augmentation's seed, the epoch and the sample; without augmentation all epochs share one table. Against a teacher
    that is asked at every step they differ by rounding, because the samples meet in other batches. The processes of a
    distributed run share the work.
    """

    def __init__(
        self, teacher: nn.Module, dataset: Dataset, batches: Batches, augment: Augment,
        accelerator: accelerate.Accelerator, folder: Path | None,
    ) -> None:  # fmt: skip
        self.teacher, self.batches, self.accelerator, self.folder = teacher, batches, accelerator, folder
        self.shape = len(dataset.train), *dataset.outputs
        self.changing = is_changing(augment)
        self._epoch, self._logits = -1, torch.empty(0)

    def of(self, epoch: int) -> Tensor:
        """float32 [N, ...] for the training split as augmented in this epoch, on the training device."""
        epoch = epoch if self.changing else 0
        if epoch != self._epoch:
            self._epoch, self._logits = epoch, self._table(epoch)
        return self._logits

    def _table(self, epoch: int) -> Tensor:
        if self.folder is None:
            return self._computed(epoch)
        file = self.folder / f"epoch_{epoch:04d}.npy"
        stored = _read(file, self.shape)
        # All processes or none: computing is shared work, and another run may write the file just now.
        have = self.accelerator.reduce(torch.tensor(float(stored is not None), device=self.batches.device), "mean")
        if stored is not None and have == 1:
            return stored.to(self.batches.device)
        logits = self._computed(epoch)
        if self.accelerator.is_main_process:
            _write(logits, file)
        return logits

    @torch.no_grad()
    def _computed(self, epoch: int) -> Tensor:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        logits, at = torch.zeros(self.shape, device=self.batches.device), 0
        for number, x in enumerate(self.batches.in_order(epoch)):
            if number % world == rank:
                with self.accelerator.autocast():
                    logits[at : at + len(x)] = checked_logits(
                        answer(self.teacher, x, "teacher"), self.shape[1:], "teacher"
                    )
            at += len(x)
        summed: Tensor = self.accelerator.reduce(logits, "sum")  # the rows of the others are zero
        return summed


def checked_logits(logits: Tensor, outputs: tuple[int, ...], owner: str) -> Tensor:
    """`logits`, if they are [B, *outputs], as the data wants. Raises RecipeError when the network answers otherwise."""
    if logits.shape[1:] != outputs:
        wanted = [len(logits), *outputs]
        raise RecipeError(
            f"the {owner} gives {list(logits.shape)} for {len(logits)} images, and the data asks for {wanted}",
            allowed=f"expected: logits {wanted} of teacher and student alike",
            fix=f"use a {owner} that was made for these classes",
            key=owner,
        )
    return logits


def is_changing(augment: Augment) -> bool:
    """Whether a sample looks another way in every epoch."""
    return bool(augment.crop or augment.flip)


def _read(file: Path, shape: tuple[int, ...]) -> Tensor | None:
    try:
        logits = torch.from_numpy(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError):  # absent, or cut short by a full disk
        return None
    return logits if logits.shape == shape else None


def _write(logits: Tensor, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as handle:
        np.save(handle, logits.cpu().numpy())
    partial.replace(file)
