"""Calibration sets: which training images a quantizer sees, pinned down by sample ids and a hash of their pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic
import yaml
from pydantic import Field

from edgekd.data.dataset import Dataset, Images, Split, TaskChoice
from edgekd.data.loading import carve, read
from edgekd.errors import DataError, RecipeError
from edgekd.recipe import Section
from edgekd.target import shipped_folder


class Selection(Section):
    """What a file in `calib/` says: the images, without the pixels.

    sample_ids are positions in the train part of the source (what is left of it when a test share is kept from it), so
    no test image can be among them.
    """

    dataset: str = Field(description="the source, see: edgekd list datasets")
    options: dict[str, Any] = Field({}, description="its options; a path is given where the set is used")
    split: Literal["train"] = "train"
    seed: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=1)]
    sample_ids: list[Annotated[int, Field(ge=0)]]
    sha256: str = Field(description="of the pixels, uint8 [n, C, H, W], and their shape")
    class_counts: dict[str, int]


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """A selection with its samples, in the order of `sample_ids`."""

    selection: Selection
    samples: Split


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a quantizer looks at: training samples, checked against the data set that they calibrate for.

    about: source, n, seed, sha256 and class_counts, for the manifest. warnings: sentences for the report.
    """

    samples: Split
    about: dict[str, Any]
    warnings: tuple[str, ...]


def of(dataset: Dataset, source: str | None, options: Mapping[str, Any], *, n: int, seed: int) -> Calibration:
    """The calibration images for a data set: a set by name or path, or n drawn from its training split.

    options: of the data set's source, for a named set. Images that occur in the test split too are not drawn.
    Raises DataError for a set that does not fit: other images, of another size, all of one class or of one value, or
    images that the test split has.
    """
    if source is None:
        samples = dataset.train[carve(dataset.task.strata(dataset.train.labels), n, "calibration", seed)[1]]
        samples = samples[np.flatnonzero(~_among(samples.images, dataset.test.images))]
        where = f"train, drawn with seed {seed}"
    else:
        where, found = (
            source,
            load(source, {key: value for key, value in options.items() if key == "path"}, dataset.task.choice),
        )
        samples, seed = found.samples, found.selection.seed
        _check_source(where, found, dataset)
    warnings = _check(where, samples, dataset)
    about = {
        "source": where, "n": len(samples), "seed": seed, "sha256": _sha256(samples.images),
        "class_counts": dataset.task.counts(samples.labels, dataset.class_names),
    }  # fmt: skip
    return Calibration(samples, about, tuple(warnings))


def _check_source(where: str, found: CalibrationSet, dataset: Dataset) -> None:
    fix = "make one from this data: edgekd calib"
    if found.selection.dataset != dataset.name:
        raise DataError(
            f"calibration set {where}: it is of {found.selection.dataset}",
            allowed=f"expected: images of the data to quantize for, {dataset.name}",
            fix=fix,
        )
    shapes = ["x".join(map(str, images.shape[1:])) for images in (found.samples.images, dataset.train.images)]
    if shapes[0] != shapes[1]:
        raise DataError(f"calibration set {where}: images of {shapes[0]}", allowed=f"expected: {shapes[1]}", fix=fix)
    in_test = np.flatnonzero(_among(found.samples.images, dataset.test.images))
    if len(in_test):
        raise DataError(
            f"calibration set {where}: {len(in_test)} of its images are in the test split, sample"
            f" {found.selection.sample_ids[in_test[0]]} first",
            allowed="what is measured on must not have been seen before",
            fix=fix,
        )


def _check(where: str, samples: Split, dataset: Dataset) -> list[str]:
    """Raise DataError for images that cannot calibrate; return what the reader of a report should know."""
    fix = "raise quantize.calibration_images, or make another set: edgekd calib"
    counts = dataset.task.counts(samples.labels, dataset.class_names)
    seen = [name for name, n in counts.items() if n]
    if len(seen) == 1 < len(counts):
        raise DataError(
            f"calibration set {where}: all images are of the class {seen[0]}",
            allowed=f"expected: images of all {dataset.num_classes} classes",
            fix=fix,
        )
    flat = samples.images.reshape(len(samples), -1)
    if not len(samples) or (flat == flat[:, :1]).all():
        raise DataError(
            f"calibration set {where}: no image in it has two different pixels",
            allowed="expected: images like those that the network will see",
            fix=fix,
        )
    missing = [name for name, n in counts.items() if not n]
    return [f"calibrated without an image of: {', '.join(missing)}"] if missing else []


def _among(images: Images, others: Images) -> npt.NDArray[np.bool_]:
    """Which of the images [N, C, H, W] are, pixel by pixel, also in `others`."""
    known = {hash(image.tobytes()) for image in others}
    return np.array([hash(image.tobytes()) in known for image in images], bool)


def make(
    dataset: str, options: Mapping[str, Any], task: TaskChoice | None = None, *, n: int, seed: int
) -> CalibrationSet:
    """Select n training samples, each class in proportion to its size; a pure function of the data and the seed.

    Raises RecipeError when there are not n to select from.
    """
    parts = read(dataset, options, task)
    ids = carve(parts.task.strata(parts.train.labels), n, "calibration", seed)[1]
    if len(ids) < n:
        raise RecipeError(
            f"a calibration set of {n} samples cannot be selected from {dataset}",
            allowed=f"expected: at most {len(ids)}",
            fix=f"ask for {len(ids)} samples or fewer",
        )
    samples = parts.train[ids]
    selection = Selection(
        dataset=dataset,
        options={key: value for key, value in options.items() if key != "path"},
        seed=seed,
        n=n,
        sample_ids=ids.tolist(),
        sha256=_sha256(samples.images),
        class_counts=parts.task.counts(samples.labels, parts.class_names),
    )
    return CalibrationSet(selection, samples)


def save(calibration: CalibrationSet, file: Path) -> None:
    """Write the selection as YAML."""
    text = yaml.safe_dump(calibration.selection.model_dump(), sort_keys=False, default_flow_style=None, width=120)
    file.write_text(text, encoding="utf-8")


def load(source: str, options: Mapping[str, Any] | None = None, task: TaskChoice | None = None) -> CalibrationSet:
    """A shipped set by name, or one by the path of its YAML; `options` win over those of the file (`path`, say).

    Raises RecipeError for a file that is no calibration set, DataError when the data are not those it was made from.
    """
    file = find(source)
    selection = _parsed(file)
    train = read(selection.dataset, {**selection.options, **(options or {})}, task).train
    ids = np.asarray(selection.sample_ids, np.int64)
    samples = train[ids] if len(ids) == selection.n and ids.max() < len(train) else None
    if samples is None or _sha256(samples.images) != selection.sha256:
        raise DataError(
            f"{file}: the images of {selection.dataset} are not those that this calibration set was made from",
            allowed=f"expected: {selection.n} images with sha256 {selection.sha256[:12]}...",
            fix="use the same files and options, or make a new calibration set",
        )
    return CalibrationSet(selection, samples)


def find(source: str) -> Path:
    """The file of a calibration set: a shipped one by name, or a path. Raises RecipeError when there is none."""
    path = Path(source)
    file = path if path.suffix in (".yaml", ".yml") else shipped_folder("calib") / f"{source}.yaml"
    if not file.exists():
        raise RecipeError(
            f"the calibration set {file} does not exist",
            allowed=f"shipped: {', '.join(_shipped())}; or the path of a .yaml file",
            fix="make one: edgekd calib",
            key="quantize.calibration",
        )
    return file


def _shipped() -> list[str]:
    return sorted(path.stem for path in shipped_folder("calib").glob("*.yaml"))


def _parsed(file: Path) -> Selection:
    keys = f"keys: {', '.join(Selection.model_fields)}"
    fix = f"name a shipped calibration set ({', '.join(_shipped())}), or a .yaml file"
    try:
        return Selection.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(
            f"the calibration set {file} cannot be read: {error.strerror}", allowed=keys, fix=fix
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"the calibration set {file} is not YAML: {reason}", allowed=keys, fix=fix) from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        what = f"{file}: {key or 'the calibration set'}: {first['msg'].lower()}"
        raise RecipeError(what, allowed=keys, fix=fix) from None


def _sha256(images: Images) -> str:
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    return digest.hexdigest()
