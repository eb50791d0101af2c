"""What must hold of data before anything is trained on it. Every error names the file and the sample."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from edgekd.data.dataset import Images, Part, RawData
from edgekd.errors import DataError


def checked(raw: RawData) -> RawData:
    """`raw` with int64 labels, class names for all classes, and notes on what is odd but not wrong.

    Raises DataError for an empty part, labels that are no class numbers, images of another shape than the training
    images, fewer than two classes, and a class that is seen in test or validation but not in train.
    """
    others = {name: part for name, part in (("validation", raw.val), ("test", raw.test)) if part is not None}
    for part in (raw.train, *others.values()):
        _check_part(part, raw.class_names)
    names = raw.class_names or tuple(str(k) for k in range(int(max(raw.train.labels)) + 1))
    seen = np.unique(raw.train.labels)
    if len(seen) < 2:
        raise DataError(
            f'{raw.train.file}: all {len(raw.train.labels)} training samples are of one class, "{names[int(seen[0])]}"',
            allowed="expected: at least two classes",
            fix="add samples of another class",
        )
    notes = list(raw.notes)
    if len(seen) < len(names):
        missing = [name for k, name in enumerate(names) if k not in set(seen.tolist())]
        notes.append(f"{len(missing)} of {len(names)} classes have no training sample: {', '.join(missing[:5])}")
    for name, part in others.items():
        _check_against_train(name, part, raw.train, names)
        shared = _shared(raw.train.images, part.images)
        if len(shared):
            notes.append(f"{len(shared)} {name} images are also in train, first: {part.where(int(shared[0]))}")
    return replace(
        raw,
        train=_with_int64_labels(raw.train),
        val=None if raw.val is None else _with_int64_labels(raw.val),
        test=None if raw.test is None else _with_int64_labels(raw.test),
        class_names=names,
        notes=tuple(notes),
    )


def _with_int64_labels(part: Part) -> Part:
    return replace(part, labels=part.labels.astype(np.int64))


def _check_part(part: Part, names: tuple[str, ...]) -> None:
    if not len(part.images):
        raise DataError(f"{part.file}: there is no image in it", allowed="expected: at least two", fix="check the path")
    if part.labels.shape != part.images.shape[:1]:
        raise DataError(
            f"{part.file}: {len(part.images)} images, but labels of shape {list(part.labels.shape)}",
            allowed="expected: one label per image",
            fix="make the file anew; it may be cut short",
        )
    if part.labels.dtype.kind not in "iu":
        raise DataError(
            f"{part.file}: the labels are of type {part.labels.dtype}",
            allowed="expected: integers, 0 for the first class",
            fix="save them as int64",
        )
    # Without names, a class number as large as the number of samples is no class number (an id, a regression target).
    limit = len(names) or len(part.labels)
    wrong = np.flatnonzero((part.labels < 0) | (part.labels >= limit))
    if len(wrong):
        raise DataError(
            f"{part.where(int(wrong[0]))}: the label is {part.labels[wrong[0]]}, and {len(wrong) - 1} more like it",
            allowed=f"expected: 0 to {limit - 1}" + (f", for the {len(names)} class names" if names else ""),
            fix="correct the labels, or the class names",
        )


def _check_against_train(name: str, part: Part, train: Part, names: tuple[str, ...]) -> None:
    if part.images.shape[1:] != train.images.shape[1:]:
        raise DataError(
            f"{part.file}: images of shape {list(part.images.shape[1:])}, those of {train.file} are"
            f" {list(train.images.shape[1:])}",
            allowed="expected: the same channels, height and width in every part",
            fix="make all parts the same way",
        )
    alien = np.flatnonzero(~np.isin(part.labels, train.labels))
    if len(alien):
        label = int(part.labels[alien[0]])
        known = f'"{names[label]}"' if label < len(names) else str(label)
        raise DataError(
            f"{part.where(int(alien[0]))}: class {known} is in the {name} part only",
            allowed=f"expected: one of the {len(np.unique(train.labels))} classes of {train.file}",
            fix=f"add training samples of class {known}, or take it out of the {name} part",
        )


def _shared(train: Images, other: Images) -> np.ndarray:
    """The positions in `other` of images that are, byte for byte, in `train` as well."""
    known = {hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in train}
    return np.flatnonzero([hashlib.blake2b(image.tobytes(), digest_size=16).digest() in known for image in other])
