"""Calibration sets: which training images a quantizer sees, pinned down by sample ids and a hash of their pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import yaml
from pydantic import Field

from edgekd.data.dataset import Images, Split
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


def make(dataset: str, options: Mapping[str, Any], *, n: int, seed: int) -> CalibrationSet:
    """Select n training samples, each class in proportion to its size; a pure function of the data and the seed.

    Raises RecipeError when there are not n to select from.
    """
    parts = read(dataset, options)
    ids = carve(parts.train.labels, n, "calibration", seed)[1]
    if len(ids) < n:
        raise RecipeError(
            f"a calibration set of {n} samples cannot be selected from {dataset}",
            allowed=f"expected: at most {len(ids)}",
            fix=f"ask for {len(ids)} samples or fewer",
        )
    samples = parts.train[ids]
    counts = np.bincount(samples.labels, minlength=len(parts.class_names)).tolist()
    selection = Selection(
        dataset=dataset,
        options={key: value for key, value in options.items() if key != "path"},
        seed=seed,
        n=n,
        sample_ids=ids.tolist(),
        sha256=_sha256(samples.images),
        class_counts=dict(zip(parts.class_names, counts, strict=True)),
    )
    return CalibrationSet(selection, samples)


def save(calibration: CalibrationSet, file: Path) -> None:
    """Write the selection as YAML."""
    text = yaml.safe_dump(calibration.selection.model_dump(), sort_keys=False, default_flow_style=None, width=120)
    file.write_text(text, encoding="utf-8")


def load(source: str, options: Mapping[str, Any] | None = None) -> CalibrationSet:
    """A shipped set by name, or one by the path of its YAML; `options` win over those of the file (`path`, say).

    Raises RecipeError for a file that is no calibration set, DataError when the data are not those it was made from.
    """
    file = _found(source)
    selection = _parsed(file)
    train = read(selection.dataset, {**selection.options, **(options or {})}).train
    ids = np.asarray(selection.sample_ids, np.int64)
    samples = train[ids] if len(ids) == selection.n and ids.max() < len(train) else None
    if samples is None or _sha256(samples.images) != selection.sha256:
        raise DataError(
            f"{file}: the images of {selection.dataset} are not those that this calibration set was made from",
            allowed=f"expected: {selection.n} images with sha256 {selection.sha256[:12]}...",
            fix="use the same files and options, or make a new calibration set",
        )
    return CalibrationSet(selection, samples)


def _found(source: str) -> Path:
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        return path
    return shipped_folder("calib") / f"{source}.yaml"


def _parsed(file: Path) -> Selection:
    keys = f"keys: {', '.join(Selection.model_fields)}"
    shipped = ", ".join(sorted(path.stem for path in shipped_folder("calib").glob("*.yaml")))
    fix = f"name a shipped calibration set ({shipped}), or a .yaml file"
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
