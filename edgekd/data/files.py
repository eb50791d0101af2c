"""Paths that the user gives, and what the names of files and folders say."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from edgekd.data.dataset import SplitName
from edgekd.errors import DataError, RecipeError

_PART = re.compile(r"(train|val|test)(ing|id|idation)?(?![a-z])", re.IGNORECASE)
_PARTS: dict[str, SplitName] = {"train": "train", "val": "val", "test": "test"}


def existing(path: Path) -> Path:
    """`path` with ~ expanded. Raises RecipeError when nothing is there."""
    expanded = path.expanduser()
    if not expanded.exists():
        parent = expanded.absolute().parent
        raise RecipeError(
            f'data.path = "{path}": there is no such file or folder',
            allowed=f"{parent} exists" if parent.exists() else f"{parent} does not exist either",
            fix="set data.path to where the data lies",
            key="data.path",
        )
    return expanded


def part_named(name: str) -> SplitName | None:
    """The part that a file or folder name begins with: "test-00000-of-00001" -> "test", "validation" -> "val"."""
    found = _PART.match(name)
    return None if found is None else _PARTS[found[1].lower()]


def folder_of(files: Sequence[Path]) -> Path:
    """What an error about all of the files names: the one file, or the folder that they lie in."""
    return files[0] if len(files) == 1 else files[0].parent


def content(file: Path) -> bytes:
    """The bytes of a file, uncompressed when it is gzip. Raises DataError when it is cut short or unreadable."""
    try:
        data = file.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{file}: cannot be read: {error}",
            allowed="expected: a whole file, plain or gzip",
            fix="fetch the file again",
        ) from None
