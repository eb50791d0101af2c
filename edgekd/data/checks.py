"""What must hold of data before anything is trained on it. Every error names the file and the sample."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from edgekd.data.dataset import Images, Part, RawData
from edgekd.errors import DataError
from edgekd.tasks import Task


def checked(raw: RawData, task: Task) -> tuple[RawData, Task]:
    """`raw` with labels as the task stores them, names for all classes, and notes on what is odd but not wrong; and
    the task, fitted to the training labels.

    Raises DataError for an empty part, images of another shape than the training images, and labels that the task
    cannot be learned from.
    """
    others = {name: part for name, part in (("validation", raw.val), ("test", raw.test)) if part is not None}
    for part in (raw.train, *others.values()):
        if not len(part.images):
            raise DataError(
                f"{part.file}: there is no image in it", allowed="expected: at least two", fix="check the path"
            )
        task.check(part, raw.class_names)
    names = raw.class_names or task.names(raw.train.labels)
    notes = [*raw.notes, *task.notes(raw.train, names)]
    for purpose, part in {"train": raw.train, **others}.items():
        _check_shape(part, raw.train)
        task.check_against_train(purpose, part, raw.train, names)
    for purpose, part in others.items():
        shared = _shared(raw.train.images, part.images)
        if len(shared):
            notes.append(f"{len(shared)} {purpose} images are also in train, first: {part.where(int(shared[0]))}")
    task = task.fitted(raw.train.labels)
    train, val, test = (
        None if part is None else replace(part, labels=task.stored(part.labels))
        for part in (raw.train, raw.val, raw.test)
    )
    assert train is not None
    return replace(raw, train=train, val=val, test=test, class_names=names, notes=tuple(notes)), task


def _check_shape(part: Part, train: Part) -> None:
    if part.images.shape[1:] != train.images.shape[1:]:
        raise DataError(
            f"{part.file}: images of shape {list(part.images.shape[1:])}, those of {train.file} are"
            f" {list(train.images.shape[1:])}",
            allowed="expected: the same channels, height and width in every part",
            fix="make all parts the same way",
        )


def _shared(train: Images, other: Images) -> np.ndarray:
    """The positions in `other` of images that are, byte for byte, in `train` as well."""
    known = {hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in train}
    return np.flatnonzero([hashlib.blake2b(image.tobytes(), digest_size=16).digest() in known for image in other])
