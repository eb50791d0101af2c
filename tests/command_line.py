"""What tests of the command line share: an error's three lines, a store's content, an install that lacks a package."""

from __future__ import annotations

import os
from pathlib import Path


def error(lines: str) -> str:
    """An error's first line, once it is seen to be an error of three lines."""
    what, allowed, fix = lines.rstrip("\n").split("\n")
    assert what.startswith("error: ") and allowed.startswith("       ") and fix.startswith("fix:   ")
    return what


def stored(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("store/*/*"))


def without(package: str, folder: Path) -> dict[str, str]:
    """An environment in which a package is not found."""
    hidden = folder / f"without-{package}"
    hidden.mkdir(exist_ok=True)
    (hidden / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find_spec = PathFinder.find_spec\n"
        "def find_other_spec(name, path=None, target=None):\n"
        f"    return None if name.partition('.')[0] == {package!r} else find_spec(name, path, target)\n"
        "PathFinder.find_spec = find_other_spec\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(hidden), *filter(None, [os.environ.get("PYTHONPATH")])])}
