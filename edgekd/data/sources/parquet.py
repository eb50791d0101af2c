"""Parquet files with encoded images, as Hugging Face data sets have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgekd.data.dataset import RawData, SplitName
from edgekd.data.decoding import Encoded, EncodedPart, raw_from_encoded
from edgekd.data.files import existing, folder_of, part_named
from edgekd.errors import DataError, RecipeError
from edgekd.registry import register

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label")


@register("dataset")
class parquet:
    """Parquet with encoded images, as Hugging Face data sets have it: a file, or a folder with train and test files.

    Files of a folder belong to the part that their name, or the name of their folder, begins with (train, val, test);
    when none says so, all are train. The image column is a struct {bytes, path} or binary; it is called image or img,
    or `image` names it. The label column holds integers or strings; it is called label, labels or fine_label, or
    `label` names it. Class names come from the Hugging Face metadata, else from the strings, else are 0, 1, ...
    resize, channels: see `edgekd.data.decoding.raw_from_encoded`.
    """

    def __init__(
        self,
        *,
        path: Path,
        image: str | None = None,
        label: str | None = None,
        resize: int | None = None,
        channels: Literal[1, 3] | None = None,
    ) -> None:
        self.path, self.image, self.label, self.resize, self.channels = path, image, label, resize, channels

    def files(self) -> list[Path]:
        """The parquet files of all parts. Raises RecipeError when there is none for training."""
        return [file for files in self._parts().values() for file in files]

    def read(self) -> RawData:
        """Read and decode them. Raises DataError that names file and row."""
        names: tuple[str, ...] = ()
        first: Path | None = None
        images: dict[SplitName, list[Encoded]] = {}
        labels: dict[SplitName, list[Any]] = {}
        parts = self._parts()
        for part, files in parts.items():
            images[part], labels[part] = [], []
            for file in files:
                table, own = self._table(file)
                if first is not None and own != names:
                    raise DataError(
                        f"{file}: its class names are not those of {first}",
                        allowed="expected: the same names in the same order in every file",
                        fix="save all parts from one data set",
                    )
                names, first = own, file
                images[part] += _encoded(table.column(0), file)
                labels[part] += _labels(table.column(1), file)
        if any(isinstance(label, str) for rows in labels.values() for label in rows):
            names = tuple(sorted({str(label) for rows in labels.values() for label in rows}))
            number = {name: k for k, name in enumerate(names)}
            labels = {part: [number[str(label)] for label in rows] for part, rows in labels.items()}
        encoded = {
            part: EncodedPart(images[part], np.asarray(labels[part], np.int64), folder_of(files))
            for part, files in parts.items()
        }
        return raw_from_encoded(encoded, names, resize=self.resize, channels=self.channels)

    def _parts(self) -> dict[SplitName, list[Path]]:
        path = existing(self.path)
        if path.is_file():
            return {"train": [path]}
        parts: dict[SplitName, list[Path]] = {}
        files = sorted(file for file in path.rglob("*.parquet") if file.is_file())
        for file in files:
            part = part_named(file.name) or part_named(file.parent.name if file.parent != path else "")
            if part:
                parts.setdefault(part, []).append(file)
        parts = parts or {"train": files}
        if not parts.get("train"):
            raise RecipeError(
                f'data.path = "{self.path}": no parquet file for training in this folder',
                allowed="expected: *.parquet, of which those for training have names that begin with train",
                fix="set data.path to a parquet file, or to a folder that holds some",
            )
        return parts

    def _table(self, file: Path) -> tuple[Any, tuple[str, ...]]:
        """The image and the label column of a file, in this order, and the class names that its metadata gives."""
        import pyarrow
        import pyarrow.parquet

        try:
            schema = pyarrow.parquet.read_schema(file)
            image = _column(file, schema, "image", self.image, _IMAGE_NAMES, pyarrow.types.is_struct)
            label = _column(file, schema, "label", self.label, _LABEL_NAMES, None)
            return pyarrow.parquet.ParquetFile(file).read([image, label]).select([image, label]), _names(schema, label)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{file}: not a readable parquet file: {str(error).splitlines()[0]}",
                allowed="expected: a whole parquet file",
                fix="fetch the file again",
            ) from None


def _column(file: Path, schema: Any, what: str, given: str | None, usual: tuple[str, ...], fits: Any) -> str:
    candidates = [given] if given is not None else [*usual, *(f.name for f in schema if fits and fits(f.type))]
    for name in candidates:
        if name in schema.names:
            return name
    raise RecipeError(
        f"{file}: no {what} column" + (f' "{given}"' if given is not None else f" called {' or '.join(usual)}"),
        allowed=f"it has the columns: {', '.join(schema.names)}",
        fix=f"set data.{what} to one of them",
    )


def _names(schema: Any, label: str) -> tuple[str, ...]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _encoded(column: Any, file: Path) -> list[Encoded]:
    import pyarrow

    if pyarrow.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        chunks = [chunk.field("bytes") for chunk in column.chunks]
    else:
        chunks = column.chunks
    if not all(pyarrow.types.is_binary(chunk.type) or pyarrow.types.is_large_binary(chunk.type) for chunk in chunks):
        raise DataError(
            f"{file}: the image column is of type {column.type}",
            allowed="expected: a struct with the field bytes, or binary",
            fix="set data.image to the column with the encoded images",
        )
    rows = [data for chunk in chunks for data in chunk.to_pylist()]
    if None in rows:
        raise DataError(
            f"{file}: row {rows.index(None)}: there are no image bytes",
            allowed="expected: the encoded image in every row (a path alone is not enough)",
            fix="save the data set with its images embedded",
        )
    return [Encoded(f"{file}: row {i}", data) for i, data in enumerate(rows)]


def _labels(column: Any, file: Path) -> list[Any]:
    rows: list[Any] = column.to_pylist()
    for i, label in enumerate(rows):
        if not isinstance(label, int | str):
            raise DataError(
                f"{file}: row {i}: the label is {label!r}",
                allowed="expected: an integer, 0 for the first class, or the class name",
                fix="correct the label, or set data.label to the column that holds them",
            )
    return rows
