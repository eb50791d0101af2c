"""The machine that edgekd itself runs on."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgekd.device import Transport
from edgekd.errors import RecipeError, StageError
from edgekd.registry import register


@register("transport", "local")
class Local(Transport):
    """This machine: a folder under the work directory and a child process."""

    def __init__(self, url: str, workdir: Path, *, python: str = "") -> None:
        if url != "local:":
            raise RecipeError(
                f"device {url!r} names no machine", allowed='this machine is "local:"', fix="--device local:"
            )
        self.python = python or sys.executable
        self._workdir = workdir

    def make_folder(self) -> str:
        """A fresh folder under the work directory."""
        self._workdir.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="job-", dir=self._workdir.resolve())

    def remove_folder(self, folder: str) -> None:
        """Delete it."""
        shutil.rmtree(folder, ignore_errors=True)

    def put(self, source: Path, folder: str, name: str) -> None:
        """Copy. Not a link: what runs there must not reach what is stored here."""
        target = Path(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)

    def get(self, folder: str, name: str, target: Path, limit_bytes: int) -> None:
        """Copy one file out of the folder."""
        source = Path(folder, name)
        if not source.is_file() or source.is_symlink():
            raise StageError(
                f"{name} was not written on the device",
                allowed=f"looked in {folder}",
                fix="measure again: edgekd bench",
            )
        if (size := source.stat().st_size) > limit_bytes:
            raise StageError(
                f"{name} from the device has {size} bytes",
                allowed=f"at most {limit_bytes} are expected",
                fix="see what the device writes, and measure again",
            )
        shutil.copyfile(source, target)

    def command(self, argv: Sequence[str], folder: str) -> tuple[list[str], Path | None]:
        """The command itself, in the folder."""
        return list(argv), Path(folder)
