"""A board that nobody can reach: what a kit's run left there answers in its place."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgekd.device import Transport, not_fetched, porter
from edgekd.documents import parsed
from edgekd.errors import RecipeError, StageError
from edgekd.registry import register

VERSION = 1
LIMIT_BYTES = 1 << 30
COPY_AGAIN = "copy it again, or run there: python3 run.py"
_SAYS = "import pathlib, sys; sys.stdout.write(pathlib.Path('said').read_text())"


def read(path: Path) -> dict[str, Any]:
    """What `run.py` wrote: {kit, jobs}. Raises StageError unless it is whole, RecipeError when it is not there."""
    try:
        if path.stat().st_size > LIMIT_BYTES:
            raise _not_results(path, f"it has {path.stat().st_size} bytes")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"{path}: {'there is no such file' if isinstance(error, FileNotFoundError) else error.strerror}",
            allowed="expected: the results.json that a kit's run.py wrote",
            fix="copy it from the board, or run there: python3 run.py",
        ) from error
    except UnicodeDecodeError as error:
        raise _not_results(path, "it is no text") from error
    content = parsed(text, str(path), limit=LIMIT_BYTES, fix=COPY_AGAIN)
    seal = content.pop("seal", None)
    if content.get("edgekd_results") != VERSION or not isinstance(content.get("jobs"), dict):
        raise _not_results(path, f"edgekd_results = {json.dumps(content.get('edgekd_results'))[:20]}")
    if hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() != seal:
        raise _not_results(path, "its sha256 is not the one in it")
    return content


def _not_results(path: Path, why: str) -> StageError:
    return StageError(
        f"{path} is damaged, or not what a kit's run.py wrote: {why}",
        allowed=f"expected: JSON with edgekd_results = {VERSION}, sealed, of at most {LIMIT_BYTES >> 20} MB",
        fix=COPY_AGAIN,
    )


@register("transport", "kit")
class Kit(Transport):
    """The results.json of a kit that was run on a board: kit:PATH.

    Nothing is run: commands answer what the same commands left there, for the same files alone.
    """

    recorded = True

    def __init__(self, url: str, workdir: Path) -> None:
        self._path, self._root = Path(url.partition(":")[2]), str(workdir.resolve())
        self._jobs: dict[str, str] = {}  # by folder: of which job of the kit it holds the files

    @cached_property
    def _results(self) -> dict[str, Any]:
        return read(self._path)

    @property
    def python(self) -> str:
        """Said in commands only."""
        return "python3"

    def make_folder(self, name: str = "") -> str:
        """A folder under the work directory."""
        return porter.make(self._root, name)

    def remove_folder(self, folder: str) -> None:
        """Delete it."""
        porter.remove(self._root, folder)

    def lock(self, owner: Mapping[str, str]) -> None:
        """Nobody else can disturb what was."""

    def unlock(self) -> None:
        """See lock."""

    def holder(self) -> dict[str, str]:
        """Nobody."""
        return {}

    def put(self, sources: Mapping[str, Path], folder: str) -> None:
        """See of which job of the kit these files are. Raises StageError when they are not those that it was of."""
        if "spec.json" in sources:
            self._check_spec(json.loads(sources["spec.json"].read_text(encoding="utf-8")))
            self._jobs[folder] = "bench"
        elif "model.onnx" in sources:
            digest = hashlib.sha256(sources["model.onnx"].read_bytes()).hexdigest()
            same = [name for name, job in self._results["jobs"].items() if job.get("model_sha256") == digest]
            if not same:
                raise self._of_another("model.onnx")
            self._jobs[folder] = same[0]

    def _check_spec(self, ours: dict[str, Any]) -> None:
        theirs = self._job("bench").get("spec")
        if not isinstance(theirs, dict) or not isinstance(theirs.get("files"), dict):
            raise _not_results(self._path, "it holds no benchmark")
        for name, sha256 in theirs["files"].items():
            if ours["files"].get(name) != sha256:
                raise self._of_another(name)
        if {**ours, "files": None} != {**theirs, "files": None}:
            raise self._of_another("spec.json")

    def _of_another(self, name: str) -> StageError:
        return StageError(
            f"{self._path} is of another kit: {name} differs",
            allowed="results belong to the engines, samples and settings of the kit that they were made with",
            fix="make the kit again with this edgekd, and run it there: edgekd export --target TARGET",
        )

    def _job(self, name: str) -> dict[str, Any]:
        job = self._results["jobs"].get(name)
        if not isinstance(job, dict) or not isinstance(job.get("files"), dict):
            raise _not_results(self._path, f"it has no results of {name}")
        return job

    def command(self, argv: Sequence[str], folder: str) -> tuple[list[str], Path | None]:
        """A command on this machine that says what the one there said."""
        job = self._jobs.get(folder, "bench")
        if argv[-1] == "--key":
            said = json.dumps(parsed(self._content(job, "build.json").decode(), "build.json").get("identity"))
        elif argv[-1] == "facts":
            said = json.dumps(parsed(self._content(job, "result.json").decode(), "result.json").get("device"))
        else:
            said = self._content(job, "log").decode("utf-8", "replace") if "log" in self._job(job)["files"] else ""
        Path(folder, "said").write_text(said, encoding="utf-8")
        return [sys.executable, "-c", _SAYS], Path(folder)

    def get(self, folder: str, name: str, target: Path, limit_bytes: int) -> None:
        """One of the files that the job left."""
        content = self._content(self._jobs[folder], name)
        if len(content) > limit_bytes:
            raise not_fetched(name, str(self._path), limit_bytes, len(content))
        target.write_bytes(content)

    def _content(self, job: str, name: str) -> bytes:
        listed = self._job(job)["files"].get(name)
        if not isinstance(listed, dict):
            raise not_fetched(name, str(self._path), LIMIT_BYTES)
        try:
            content = base64.b64decode(listed.get("base64", ""), validate=True)
        except (binascii.Error, ValueError, TypeError) as error:
            raise _not_results(self._path, f"{name} is not in base64") from error
        if hashlib.sha256(content).hexdigest() != listed.get("sha256"):
            raise _not_results(self._path, f"the sha256 of {name} is not the one in it")
        return content
