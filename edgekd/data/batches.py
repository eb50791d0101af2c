"""Training and evaluation batches: uint8 images in the memory of the training device, augmented there.

Everything random is drawn for the whole epoch at once from a generator that is seeded by what it may depend on, so a
batch is the same in every process layout and after every resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.data.dataset import Dataset, Images, Split
from edgekd.errors import DataError
from edgekd.recipe import Augment
from edgekd.tasks.segmentation import IGNORED


@dataclass(frozen=True, eq=False)
class Batch:
    """On the device. index: int64 [B], positions in the split; x: float32 [B, C, H, W], normalised; y: labels."""

    index: Tensor
    x: Tensor
    y: Tensor


class Batches:
    """The batches of a split, epoch by epoch; without end, and without state between epochs.

    The order is a pure function of (seed, epoch); the augmentation of sample i is a pure function of (augment.seed,
    epoch, i), whatever batch or process it falls into. With `world` processes, the batches of all ranks together are
    those of one process with `world` times the batch size. The last, incomplete batch of an epoch is left out, unless
    it is the only one: then it is used, and shared out equally.

    augment.crop pads with that many black pixels on every side and cuts a window of the old size out at a random
    place (black before normalisation, as in He et al., CVPR 2016, section 4.2, as usually implemented); augment.flip
    mirrors left and right half of the time.
    """

    def __init__(
        self,
        split: Split,
        dataset: Dataset,
        *,
        batch_size: int,
        augment: Augment,
        seed: int,
        device: torch.device | str,
        rank: int = 0,
        world: int = 1,
        channels_last: bool = False,
    ) -> None:
        if len(split) < world:
            raise DataError(
                f"{dataset.name}: {len(split)} samples cannot be shared by {world} processes",
                allowed="expected: a sample per process at least",
                fix="start fewer processes, or give more samples",
            )
        self.device = torch.device(device)
        self._images = torch.from_numpy(split.images).to(device)
        self._labels = torch.from_numpy(split.labels).to(device)
        self._maps = dataset.task.per_pixel
        self._normalize = Normalize(dataset, device, channels_last)
        self._augment, self._seed, self._rank = augment, seed, rank
        self._size = min(batch_size, len(split) // world)
        self._global_size = self._size * world

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._labels) // self._global_size

    def epoch(self, epoch: int, start: int = 0, replays: int = 1) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on, which is how a resumed run skips those it has done.

        replays: so many in a row are the same batch; the number of batches stays.
        """
        order = torch.randperm(len(self._labels), generator=_generator("order", self._seed, epoch)).to(self.device)
        changes = self._drawn(epoch)
        for number in range(start, len(self)):
            first = number // replays * self._global_size + self._rank * self._size
            index = order[first : first + self._size]
            labels = self._moved(self._labels, index, changes, IGNORED) if self._maps else self._labels[index]
            yield Batch(index, self._images_at(index, changes), labels)

    def in_order(self, epoch: int) -> Iterator[Tensor]:
        """Every sample once, in the order of the split, augmented as in this epoch: float32 [B, C, H, W]."""
        changes = self._drawn(epoch)
        for index in torch.arange(len(self._labels), device=self.device).split(self._size):
            yield self._images_at(index, changes)

    def _drawn(self, epoch: int) -> Tensor:
        """int64 [N, 3]: top and left edge of each sample's window, and whether it is mirrored."""
        generator = _generator("augment", self._augment.seed, epoch)
        n, crop = len(self._labels), self._augment.crop
        corners = torch.randint(0, 2 * crop + 1, (n, 2), generator=generator)
        mirrored = torch.randint(0, 2, (n, 1), generator=generator) * self._augment.flip
        return torch.cat((corners, mirrored), 1).to(self.device)

    def _images_at(self, index: Tensor, changes: Tensor) -> Tensor:
        """The samples at `index` [B], augmented by their rows of `changes` and normalised."""
        return self._normalize(self._moved(self._images, index, changes, 0))

    def _moved(self, values: Tensor, index: Tensor, changes: Tensor, outside: int) -> Tensor:
        """Of uint8 [N, ..., H, W] the samples at `index`, cropped and mirrored by their rows of `changes`.

        outside: what is padded with. The slices of a volume move together.
        """
        chosen, own = values.index_select(0, index), changes.index_select(0, index)
        if not (self._augment.crop or self._augment.flip):
            return chosen
        moved = chosen.reshape(len(index), -1, *chosen.shape[-2:])
        if self._augment.crop:
            padded = F.pad(moved, (self._augment.crop,) * 4, value=outside)
            moved = windows(padded, own[:, :2], moved.shape[2:])
        if self._augment.flip:
            # Chosen by bits: torch.where takes three times as long for uint8.
            mask = (own[:, 2] * 255).to(torch.uint8).view(-1, 1, 1, 1)
            moved = moved ^ ((moved ^ moved.flip(-1)) & mask)
        return moved.reshape(chosen.shape)


class UnlabelledBatches:
    """Batches of images without their labels, by their number since the start; epoch after epoch, as in `Batches`."""

    def __init__(self, images: Images, dataset: Dataset, **options: Any) -> None:
        self._batches = Batches(Split(images, np.zeros(len(images), np.int64)), dataset, **options)
        self._running: tuple[int, Iterator[Batch]] = -1, iter(())

    def __getitem__(self, number: int) -> Tensor:
        """The images of a batch, float32 [B, C, H, W], normalised; the next one is the quickest to get."""
        epoch, position = divmod(number, len(self._batches))
        following, batches = self._running
        if number != following or not position:
            batches = self._batches.epoch(epoch, start=position)
        self._running = number + 1, batches
        return next(batches).x


def windows(images: Tensor, corners: Tensor, size: torch.Size) -> Tensor:
    """From each image [B, C, H, W] the window of `size` (height, width) at its own corner [B, 2] (top, left).

    One index_select on a view that has a window at every byte: five times as fast on a CPU as a gather by index.
    """
    batch, channels, height, width = images.shape
    flat = images.contiguous().view(-1)
    span = (channels - 1) * height * width + (size[0] - 1) * width + size[1]
    every = flat.as_strided(
        (flat.numel() - span + 1, channels, *size),
        (1, height * width, width, 1),
    )
    image = torch.arange(batch, device=images.device) * (channels * height * width)
    return every.index_select(0, image + corners[:, 0] * width + corners[:, 1])


class Normalize:
    """uint8 [B, C, H, W] to float32, (x / 255 - mean) / std per channel; bit for bit `Dataset.normalize` on a CPU."""

    def __init__(self, dataset: Dataset, device: torch.device | str, channels_last: bool = False) -> None:
        dimensions = dataset.shape.dimensions
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(-1, *[1] * (len(dimensions) - 1))
            for values in (dataset.mean, dataset.std)
        )
        last = torch.channels_last if len(dimensions) == 3 else torch.channels_last_3d
        self._format = last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 [B, C, H, W]."""
        x = images.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)
        return x.contiguous(memory_format=self._format)


def evaluation_batches(
    split: Split,
    dataset: Dataset,
    *,
    batch_size: int,
    device: torch.device | str,
    channels_last: bool = False,
) -> Iterator[Tensor]:
    """All images of a split in their order, as normalised float32 [B, C, H, W]; the last batch may be short."""
    normalize = Normalize(dataset, device, channels_last)
    for start in range(0, len(split), batch_size):
        yield normalize(torch.from_numpy(split.images[start : start + batch_size]).to(device))


def _generator(purpose: str, seed: int, epoch: int) -> torch.Generator:
    # Hashed, because generators with neighbouring seeds are not independent of each other.
    digest = hashlib.sha256(f"{purpose} {seed} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
