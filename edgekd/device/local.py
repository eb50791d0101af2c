"""The machine that edgekd itself runs on."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgekd.device import BusyError, Transport, disk_full, files_below, not_fetched, not_signed, porter, signers
from edgekd.errors import RecipeError
from edgekd.registry import register


@register("transport", "local")
class Local(Transport):
    """This machine: a folder under the work directory and a child process.

    python: another interpreter than ours; signing_key: the ssh key that signs what is run.
    """

    def __init__(self, url: str, workdir: Path, *, python: str = "", signing_key: str = "") -> None:
        if url != "local:":
            raise RecipeError(
                f"device {url!r} names no machine", allowed='this machine is "local:"', fix="--device local:"
            )
        self._python, self.signing_key = python or sys.executable, signing_key
        self._root = str(workdir.resolve())

    @property
    def python(self) -> str:
        """This interpreter, or the option's."""
        return self._python

    def make_folder(self, name: str = "") -> str:
        """A folder under the work directory."""
        return porter.make(self._root, name)

    def remove_folder(self, folder: str) -> None:
        """End what still runs in it, and delete it."""
        porter.remove(self._root, folder)

    def lock(self, owner: Mapping[str, str]) -> None:
        """Lock a file in the work directory."""
        Path(self._root).mkdir(parents=True, exist_ok=True)
        try:
            self._lock = porter.take(self._lock_file, dict(owner))
        except porter.RefusedError as error:
            raise BusyError(error.args[1]) from None

    def unlock(self) -> None:
        """Let go of it."""
        os.close(self._lock)

    def holder(self) -> dict[str, str]:
        """Who has locked it."""
        return porter.holder(self._lock_file)

    @property
    def _lock_file(self) -> str:
        return str(Path(self._root, "lock"))

    def put(self, sources: Mapping[str, Path], folder: str) -> None:
        """Copy. Not a link: what runs there must not reach what is stored here."""
        left = files_below(sources)
        try:
            for name, source in tuple(left.items()):
                target = Path(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                del left[name]
        except OSError as error:
            kind, *details = porter.refusal(error, folder, sum(file.stat().st_size for file in left.values())).args
            if kind != "disk full":
                raise
            raise disk_full("local:", *details) from None

    def get(self, folder: str, name: str, target: Path, limit_bytes: int) -> None:
        """Copy one file out of the folder."""
        source = Path(folder, name)
        if not source.is_file() or source.is_symlink():
            raise not_fetched(name, folder, limit_bytes)
        if (size := source.stat().st_size) > limit_bytes:
            raise not_fetched(name, folder, limit_bytes, size)
        shutil.copyfile(source, target)

    def command(self, argv: Sequence[str], folder: str) -> tuple[list[str], Path | None]:
        """The command itself, in the folder."""
        try:
            signer = signers.signer_of(str(Path(folder, signers.MANIFEST)))
        except signers.UnsignedError as error:
            raise not_signed("local:", str(error)) from None
        return ["env", f"{signers.SIGNED_BY}={signer}", *argv] if signer else list(argv), Path(folder)
