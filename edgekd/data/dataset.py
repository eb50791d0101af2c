"""What a data set is: images kept as decoded uint8 in memory, with labels, task, splits and normalisation."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgekd.tasks import Judge, Task
from edgekd.tasks.classification import Classification

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[Any]  # as the task stores them
TaskChoice = str | dict[str, dict[str, Any]]  # NAME or {NAME: {option: value}}
SplitName = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Shape:
    """The size of one image: channels (1 grey, 3 RGB), height and width in pixels; the depth of a volume, 0 without."""

    channels: int
    height: int
    width: int
    depth: int = 0

    @property
    def dimensions(self) -> tuple[int, ...]:
        """(C, H, W), or (C, D, H, W) of a volume."""
        return (self.channels, *([self.depth] if self.depth else []), self.height, self.width)

    def __str__(self) -> str:
        return "x".join(map(str, self.dimensions))


@dataclass(frozen=True, eq=False)
class Split:
    """Samples of one purpose. images: uint8 [N, C, H, W], volumes [N, C, D, H, W]; labels: [N, ...], as the task has
    them; encoded: see `Part`."""

    images: Images
    labels: Labels
    encoded: Sequence[bytes | Path] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: npt.NDArray[np.int64]) -> Split:
        encoded = [self.encoded[i] for i in np.arange(len(self))[index]] if self.encoded else ()
        return Split(self.images[index], self.labels[index], encoded)

    def stored(self, n: int) -> list[bytes]:
        """The first n images as they are stored: files of an image format, else pixels as `.npy`, uint8 [C, H, W]."""
        if self.encoded:
            return [one if isinstance(one, bytes) else one.read_bytes() for one in self.encoded[:n]]
        files = [io.BytesIO() for _ in self.images[:n]]
        for file, image in zip(files, self.images, strict=False):
            np.save(file, image)
        return [file.getvalue() for file in files]


@dataclass(frozen=True, eq=False)
class Domain:
    """Images like those of a data set, from elsewhere. images: uint8 [N, C, H, W], to learn from without labels."""

    name: str
    images: Images
    test: Split


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set ready for training. mean, std: one number per channel, on the 0..1 scale, of the train split.

    class_names: of the classes, or of whatever the task has in their place. target: where the student will be used.
    `notes` tell what the user did not ask for but should know: a test share carved out, images that occur twice.
    stand_ins: the splits that hold noise in place of images, and labels that mean nothing.
    """

    name: str
    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
    task: Task = field(default_factory=Classification)
    target: Domain | None = None
    stand_ins: frozenset[SplitName] = frozenset()

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The shape of a network's answer for one image."""
        return self.task.output_shape(self.class_names, self.train.images.shape[1:])

    def judge(self, split_name: SplitName, n: int | None = None) -> Judge:
        """Of answers to the images of a split, or to its first n."""
        return Judge(self.task, self.split(split_name).labels[:n], self.outputs)

    @property
    def shape(self) -> Shape:
        """The size of every image of every split."""
        channels, *depth, height, width = self.train.images.shape[1:]
        return Shape(channels, height, width, *depth)

    def split(self, name: SplitName) -> Split:
        """The split of that name."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def normalized(self, split_name: SplitName) -> npt.NDArray[np.float32]:
        """The images of a split as a network is fed them: float32 [N, C, H, W], (x / 255 - mean) / std."""
        return self.normalize(self.split(split_name).images)

    def normalize(self, images: Images) -> npt.NDArray[np.float32]:
        """(x / 255 - mean) / std of uint8 [N, C, H, W], as float32; bit for bit what `batches` computes in torch."""
        mean, std = (
            np.asarray(values, np.float32).reshape(-1, *[1] * (images.ndim - 2)) for values in (self.mean, self.std)
        )
        x = images.astype(np.float32)
        x /= np.float32(255)
        x -= mean
        x /= std
        return x


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a source as it was read, not yet checked. images: uint8 [N, C, H, W]; labels: [N, ...], of the task.

    `where(i)` names the file and place of sample i, for errors; `file` is the file or folder of the whole part;
    `encoded` are the images in their image format, where the source has them in one.
    """

    images: Images
    labels: npt.NDArray[Any]
    file: Path
    where: Callable[[int], str]
    encoded: Sequence[bytes | Path] = ()


@dataclass(frozen=True, eq=False)
class RawData:
    """What a source reads, and what for: `task`, unless the recipe names another one.

    noise: there are no images to learn from, and the training part is noise whose labels mean nothing. `class_names` is
    empty when the source has none: they are then "0", "1", ...
    """

    train: Part
    test: Part | None = None
    val: Part | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    task: TaskChoice = "classification"
    noise: bool = False


class Source(Protocol):
    """What is registered as a data set: a class whose keyword-only parameters are its options."""

    def files(self) -> list[Path]:
        """The files whose content decides what `read` returns. Raises RecipeError when the path is wrong."""

    def read(self) -> RawData:
        """Read and decode everything. Raises DataError that names the file."""
