"""From a source to a Dataset: stratified splits, limits, normalisation; and the fingerprint of a source's files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd import registry
from edgekd.data.checks import checked
from edgekd.data.dataset import Dataset, Domain, Images, Source, Split, SplitName, TaskChoice
from edgekd.errors import DataError, MissingError, RecipeError
from edgekd.recipe import checked_choice
from edgekd.tasks import Task

# A source without a test part gives this share of its samples as test, the same ones whatever the recipe's seed:
# results of several seeds are then measured on the same samples.
TEST_SHARE = 0.2
TEST_SEED = 0

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Parts:
    """A source's parts, checked; the test part is there whether the source has one or not. `file` is that of train.

    stand_ins: see `Dataset`.
    """

    file: Path
    train: Split
    val: Split | None
    test: Split
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    task: Task
    stand_ins: frozenset[SplitName] = frozenset()


def load(
    source: str,
    options: Mapping[str, Any],
    *,
    task: TaskChoice | None = None,
    validation: float = 0.1,
    seed: int = 0,
    train_limit: int | None = None,
    test_limit: int | None = None,
    normalize: Mapping[str, Sequence[float]] | None = None,
) -> Dataset:
    """Read a registered source, check it and split it.

    task: what the labels are for; None is what the source says.
    validation: share of the train part that is carved out, stratified, as a pure function of `seed`; not used when
    the source has both a validation and a test part of its own.
    train_limit, test_limit: at most this many samples, stratified; validation is carved out of what is left of train,
    and test is cut down to the same samples whatever the seed.
    normalize: {"mean": [...], "std": [...]} per channel on the 0..1 scale; None computes them on the train split.
    Raises RecipeError for an option that cannot be meant, DataError that names the file for data that cannot be used.
    """
    if not 0 < validation < 1:
        raise RecipeError(
            f"data.validation = {validation} leaves no sample to validate on or none to train on",
            allowed="expected: a share above 0 and below 1",
            fix="set data.validation = 0.1",
        )
    parts = read(source, options, task)
    strata = parts.task.strata
    train = _limited(parts.train, strata(parts.train.labels), train_limit, seed, "data.train_limit")
    test = _limited(parts.test, strata(parts.test.labels), test_limit, TEST_SEED, "data.test_limit")
    if parts.val is None:
        rest, carved = carve(strata(train.labels), max(1, round(validation * len(train))), "validation", seed)
        if not len(carved):
            raise DataError(
                f"{parts.file}: {len(train)} training samples are too few to carve a validation split out of them",
                allowed="expected: more than one sample of at least one class",
                fix="give more samples, or raise data.train_limit",
            )
        train, val = train[rest], train[carved]
    else:
        val = parts.val
    channels = train.images.shape[1]
    if parts.stand_ins and normalize is None:
        raise RecipeError(
            "data.normalize is missing, and there is no image to measure it on",
            allowed="expected: the mean and std that the teacher was trained with",
            fix=f"with its numbers: --set 'data.normalize={{mean: {[0.5] * channels}, std: {[0.5] * channels}}}'",
            key="data.normalize",
        )
    mean, std = _statistics(train.images, parts.file) if normalize is None else _given(normalize, channels)
    train, val = replace(train, encoded=()), replace(val, encoded=())  # the test images' alone are asked for
    return Dataset(
        source, train, val, test, parts.class_names, mean, std, parts.notes, parts.task, stand_ins=parts.stand_ins
    )


def with_target(dataset: Dataset, source: str, options: Mapping[str, Any]) -> Dataset:
    """The data set, with another source as its target domain: images to learn from unlabelled, and to measure on.

    Raises DataError for images of another shape, or with other classes; and what `read` raises.
    """
    parts = read(source, options)
    shape, own = dataset.train.images.shape[1:], parts.train.images.shape[1:]
    if own != shape or len(parts.class_names) != len(dataset.class_names):
        sizes = ["x".join(map(str, one)) for one in (own, shape)]
        raise DataError(
            f"data.target_domain: {parts.file} has images of {sizes[0]} in {len(parts.class_names)} classes",
            allowed=f"expected: those of the data, {sizes[1]} in {len(dataset.class_names)} classes",
            fix="bring the images of the target domain to this shape; a class may have no image",
        )
    return replace(dataset, target=Domain(source, parts.train.images, parts.test))


def read(source: str, options: Mapping[str, Any], task: TaskChoice | None = None) -> Parts:
    """Read and check a source, for its own task or another one.

    A source without a test part gets one: its validation part, else a stratified share of train, always the same.
    """
    try:
        made: Source = registry.create("dataset", source, options=options, where="data")
        raw = made.read()
    except ModuleNotFoundError as error:
        raise MissingError(
            f'dataset "{source}" needs the Python package {error.name!r}, which is not installed',
            allowed="the plain install reads cifar, idx and npz only",
            fix="pip install 'edgekd[train]'",
        ) from error
    purpose = task_from_choice(raw.task if task is None else task)
    raw, purpose = checked(raw, purpose)
    train, val, test = (
        None if part is None else Split(part.images, part.labels, part.encoded)
        for part in (raw.train, raw.val, raw.test)
    )
    assert train is not None
    notes = list(raw.notes)
    if test is not None:
        if val is not None:
            notes.append(f"the source has a validation part: its {len(val)} samples are used, data.validation is not")
        stand_ins: frozenset[SplitName] = frozenset({"train", "val"} if raw.noise else ())
        return Parts(raw.train.file, train, val, test, raw.class_names, tuple(notes), purpose, stand_ins)
    if val is not None:
        notes.append(f"the source has no test part: its validation part of {len(val)} samples serves as test")
        return Parts(raw.train.file, train, None, val, raw.class_names, tuple(notes), purpose)
    rest, carved = carve(purpose.strata(train.labels), max(1, round(TEST_SHARE * len(train))), "test", TEST_SEED)
    if not len(carved):
        raise DataError(
            f"{raw.train.file}: {len(train)} samples are too few to carve a test part out of them",
            allowed="expected: more than one sample of at least one class, or a test part of its own",
            fix="give more samples",
        )
    if raw.noise:
        all_splits: frozenset[SplitName] = frozenset({"train", "val", "test"})
        return Parts(raw.train.file, train[rest], None, train[carved], raw.class_names, raw.notes, purpose, all_splits)
    notes.append(f"the source has no test part: {len(carved)} of its {len(train)} samples are kept for test")
    return Parts(raw.train.file, train[rest], None, train[carved], raw.class_names, tuple(notes), purpose)


def task_from_choice(choice: TaskChoice) -> Task:
    """The task that `NAME` or `{NAME: {option: value}}` names. Raises RecipeError."""
    ((name, options),) = checked_choice(choice, "task", "data.task").items()
    made: Task = registry.create("task", name, options=options, where=f"data.task.{name}")
    return made


def carve(strata: Indices, n: int, purpose: str, seed: int) -> tuple[Indices, Indices]:
    """Split 0..N-1 into (rest, carved), both ascending; a pure function of its arguments.

    `purpose` keeps what is carved for one thing independent of what is carved for another with the same seed.

    strata: [N], the class of each sample, or what the task has in its place.
    n samples are carved, each class in proportion to its size (Webster's method). Every class keeps a sample in the
    rest, so fewer are carved when n is above N - K. A larger n with the same seed carves a superset.
    """
    priority = np.empty(len(strata))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        generator = np.random.default_rng([seed, int(stratum), *purpose.encode()])
        ranks = generator.permutation(len(members))
        priority[members] = np.where(ranks == len(members) - 1, np.inf, (ranks + 0.5) / len(members))
    order = np.argsort(priority, kind="stable")[: min(n, int(np.isfinite(priority).sum()))]
    chosen = np.zeros(len(strata), bool)
    chosen[order] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _limited(split: Split, strata: Indices, limit: int | None, seed: int, option: str) -> Split:
    if limit is None or limit >= len(split):
        return split
    classes = len(np.unique(strata))
    if limit < classes:
        raise RecipeError(
            f"{option} = {limit} is less than one sample per class",
            allowed=f"expected: at least {classes}, the number of classes",
            fix=f"set {option} = {10 * classes}",
        )
    # What is left after carving away the others: it keeps at least one sample of every class.
    return split[carve(strata, len(split) - limit, option, seed)[0]]


def _statistics(images: Images, file: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel on the 0..1 scale, from exact integer sums."""
    channels, axes = images.shape[1], (0, *range(2, images.ndim))
    count = images.size // channels
    sums, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    for start in range(0, len(images), 1024):  # in pieces, so that the squares stay in the cache
        piece = images[start : start + 1024].astype(np.uint32)
        sums += piece.sum(axis=axes, dtype=np.int64)
        squares += np.square(piece).sum(axis=axes, dtype=np.int64)
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    if not std.all():
        raise DataError(
            f"{file}: channel {int(np.flatnonzero(std == 0)[0])} has one value in all pixels of the training images",
            allowed="expected: images that differ",
            fix='check the files, or give data.normalize = {"mean": [...], "std": [...]}',
        )
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def _given(normalize: Mapping[str, Sequence[float]], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = (tuple(float(value) for value in normalize.get(key, ())) for key in ("mean", "std"))
    if (len(mean), len(std)) != (channels, channels) or min(std) <= 0:
        raise RecipeError(
            f"data.normalize = {dict(normalize)} does not fit images of {channels} channel(s)",
            allowed=f"expected: mean and std, {channels} number(s) each on the 0..1 scale, every std above 0",
            fix="correct it, or leave data.normalize out to have it computed",
        )
    return mean, std


def fingerprint(source: str, options: Mapping[str, Any]) -> str:
    """Sha256 over the source's name, its options other than paths, and the names and bytes of its files.

    Nothing is decoded. Where the files lie does not matter; what they are called below their folder does, since
    names carry split and class. Raises RecipeError when the path is wrong, DataError when a file cannot be read.
    """
    found = registry.entry("dataset", source, "data.source")
    checked_options = found.validate(options, "data")
    made: Source = found.load()(**checked_options)
    files = sorted(made.files())
    root = os.path.commonpath([file.parent for file in files]) if files else ""
    content = {key: value for key, value in checked_options.items() if not isinstance(value, Path)}
    digest = hashlib.sha256(json.dumps([source, content], sort_keys=True).encode())
    for file in files:
        try:
            with file.open("rb") as stream:
                content_digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read: {error.strerror}",
                allowed="all files of the data are read",
                fix="check that the file is there and that you may read it",
            ) from None
        digest.update(json.dumps([str(file.relative_to(root)), content_digest]).encode())
    return digest.hexdigest()
