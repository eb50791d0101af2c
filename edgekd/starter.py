"""`edgekd init`: a commented recipe for the user's data, with nothing asked that can be found out."""

from __future__ import annotations

import json
import re
from pathlib import Path

from edgekd import data, registry
from edgekd.artifact import write_synced
from edgekd.data import Dataset
from edgekd.errors import EdgekdError, RecipeError, StoreError
from edgekd.recipe import DEFAULT_FILE
from edgekd.recipe_schema import json_schema

SCHEMA = Path(".edgekd") / "recipe.schema.json"
# Where people keep data, in the order in which it is looked for.
PLACES = ("data", "dataset", "datasets", "images", ".")
# Sources that accept nearly any folder come last.
LAST = ("folder",)
# Up to this size of an image, networks made for 32 pixels serve it.
SMALL_PIXELS = 64

TEMPLATE = """\
# yaml-language-server: $schema={schema}
# What to make. Every key with its meaning: edgekd schema. What there is to choose from: edgekd list
schema_version: 1
name: {name}
seed: 0

# {found}
data:
  source: {source}            # see: edgekd list datasets
{path}  validation: 0.1           # share of train that every choice is made on; test is only measured
  augment: {{crop: {crop}, flip: false}}   # flip: true where a mirrored image keeps its class

teacher:                      # leave it out for a method that learns without one, like online_peers
  network: {teacher}
  # checkpoint: teacher.safetensors   # instead of training it here
  train:
    epochs: 60
    batch_size: {batch_size}
    lr: 0.1
    schedule: cosine          # constant, step, cosine, plateau

student:
  network: {student}
  activation: lma             # learns its own shape, layer by layer; or relu, prelu, swish, aplu

distill:
  method: kd                  # see: edgekd list methods
  kd_weight: 0.7              # the rest, 0.3, is the labels' cross-entropy
  # temperature: 4            # softens the answers; by default 4 for classes, 1 for pixels
  scratch: true               # also train the student without the teacher, to see what the teacher gives
  train:
    epochs: 60
    batch_size: {batch_size}
    lr: 0.1
    schedule: cosine

export:
  batch: dynamic              # or static, for compilers that want it

quantize:
  method: none                # ptq: INT8 without training; see: edgekd list quantizers

benchmark:
  seconds: 10                 # measuring time, student and teacher together

# A budget that is missed ends the run with exit code 5.
budgets:
  accuracy_drop: 0.02         # at most two points below the teacher
  # p99_ms: 5
  # size_bytes: 500000
  # speedup: 2
"""


def write(folder: Path, path: Path | None) -> list[Path]:
    """Write edgekd.yaml and its JSON Schema into `folder`; return their paths.

    Raises RecipeError when `path` holds no data set, DataError when the data cannot be used, StoreError when the folder
    cannot be written.
    """
    source, place = _found(folder, path)
    recipe = _recipe(source, place, data.load(source, {"path": str(place)} if place else {}))
    try:
        (folder / SCHEMA).parent.mkdir(exist_ok=True)
        write_synced(folder / SCHEMA, json.dumps(json_schema(), indent=1))
        write_synced(folder / DEFAULT_FILE, recipe)
    except OSError as error:
        raise StoreError(
            f"{error.filename or folder} cannot be written: {error.strerror}",
            allowed=f"written are {DEFAULT_FILE} and {SCHEMA}",
            fix="make room, or call edgekd init in a folder that you may write to",
        ) from error
    return [DEFAULT_FILE, SCHEMA]


def _recipe(source: str, place: Path | None, dataset: Dataset) -> str:
    """The text of edgekd.yaml; `place` is where the source's files lie."""
    sizes = str(dataset.shape)
    side = max(dataset.shape.height, dataset.shape.width)
    small = side <= SMALL_PIXELS
    return TEMPLATE.format(
        schema=SCHEMA,
        # In quotes: a folder may be called 2024, and a number is no name.
        name=json.dumps(re.sub(r"[^A-Za-z0-9]+", "-", (place or Path(source)).resolve().name).strip("-") or "mine"),
        found=f"{len(dataset.train)} images to train on, {len(dataset.val)} to validate, {len(dataset.test)} to test; "
        f"{sizes}, {dataset.num_classes} classes",
        source=source,
        path=f"  path: {json.dumps(str(place))}\n" if place else "",
        crop=max(1, side // 8),
        teacher="resnet\n  depth: 56" if small else "mobilenet_v2",
        student="resnet\n  depth: 8" if small else "mobilenet_v2\n  width: 0.35",
        batch_size=min(128, max(8, len(dataset.train) // 20)),
    )


def _found(folder: Path, path: Path | None) -> tuple[str, Path | None]:
    """Which source reads the data, and where it is; the embedded digits when there is none."""
    for place in [path] if path else [folder / name for name in PLACES]:
        if place.exists():
            for source in _sources():
                if _reads(source, place):
                    return source, place if path else place.relative_to(folder)
    if path is None:
        return "digits", None
    raise RecipeError(
        f"{path}: no data set was recognised" if path.exists() else f"{path} does not exist",
        allowed=f"known formats: {', '.join(_sources())}",
        fix="see how each must look: edgekd list datasets",
    )


def _sources() -> list[str]:
    """The sources that read a path, the choosy ones first."""
    with_path = [entry.name for entry in registry.entries("dataset") if "path" in entry.options]
    return sorted(with_path, key=lambda name: (name in LAST, name))


def _reads(source: str, place: Path) -> bool:
    try:
        return bool(registry.create("dataset", source, options={"path": place}).files())
    except (EdgekdError, OSError):
        return False
