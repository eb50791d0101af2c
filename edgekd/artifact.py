"""Artifacts and the store that holds them: content-addressed, published atomically, verified when read.

    <root>/store/<stage>/<key>/{manifest.json, files}   immutable
    <root>/work/<key>/                                  scratch of a stage: survives a kill, never an artifact
    <root>/runs/<run-id>/                               what a run found

An artifact's digest covers its files except those under `log/`: it names what was made, not how long that took.
Files that depend on the clock belong there. The manifest lists all files with their sha256, and is itself sealed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import CheckpointError, StoreError

MANIFEST = "manifest.json"
RUN = "run.json"
LOG = "log"
SCHEMA_VERSION = 1


def key_of(stage: str, version: int, spec: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The address of what a stage makes: everything that would make it wrong if it changed.

    spec: what it reads of the recipe, the target and the data; inputs: digests of the artifacts that it reads.
    """
    canonical = json.dumps([stage, version, spec, inputs], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """What one stage made: an immutable folder with a manifest."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return str(self.manifest["stage"])

    @property
    def key(self) -> str:
        """Its address: see `key_of`."""
        return str(self.manifest["key"])

    @property
    def digest(self) -> str:
        """sha256 over names and contents of the files, logs left out."""
        return str(self.manifest["digest"])

    @property
    def result(self) -> Mapping[str, Any]:
        """What the stage reported about what it made."""
        found: Mapping[str, Any] = self.manifest["result"]
        return found

    def file(self, name: str) -> Path:
        """The path of one of its files."""
        return self.folder / name

    def verify(self) -> None:
        """Raises StoreError that names the file whose bytes are not those of the manifest."""
        for listed in self.manifest["files"]:
            file = self.file(listed["path"])
            if not file.is_file():
                raise _damaged(self.folder, listed["path"], "is gone from the store")
            if sha256_of(file) != listed["sha256"]:
                raise _damaged(self.folder, listed["path"], "is not what was stored")


class Store:
    """The artifacts under one root folder, usually `.edgekd`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, stage: str, key: str) -> Artifact | None:
        """The verified artifact with this key, if it is there. Raises StoreError when it is damaged."""
        folder = self.root / "store" / stage / key
        if not folder.is_dir():
            return None
        artifact = Artifact(folder, _unsealed(folder))
        if (artifact.stage, artifact.key) != (stage, key):
            raise _damaged(folder, MANIFEST, f"is that of {artifact.stage}/{artifact.key}")
        artifact.verify()
        return artifact

    def work(self, key: str) -> Path:
        """Scratch space of a stage with this key; what is in it survives a kill."""
        folder = self.root / "work" / key
        with _writing(self.root):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def run_folder(self, run_id: str) -> Path:
        """Where a run's record and report are kept."""
        folder = self.root / "runs" / run_id
        with _writing(self.root):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def cache(self, name: str, of: list[Any]) -> Path:
        """A folder for what may be recomputed at any time, by what it was computed `of`."""
        return (
            self.root
            / "cache"
            / name
            / hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()
        )

    @contextlib.contextmanager
    def locked(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Let one process at a time make an artifact. The kernel drops the lock when its holder dies."""
        work = self.work(key)
        with _writing(self.root):
            handle = (work / "lock").open("w")
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def publish(
        self, stage: str, key: str, fill: Callable[[Path], Mapping[str, Any]], about: Callable[[], Mapping[str, Any]]
    ) -> Artifact:
        """Make an artifact: `fill` writes its files into a folder and returns the result; then it appears at once.

        `about` gives what else the manifest tells (inputs, versions, seconds), asked for after `fill`.
        When `fill` raises, nothing is stored.
        """
        final = self.root / "store" / stage / key
        partial = self.work(key) / f"partial-{os.getpid()}"
        with _writing(self.root):
            partial.mkdir(exist_ok=True)
            try:
                result = fill(partial)
                files = [_listed(partial, file) for file in sorted(partial.rglob("*")) if file.is_file()]
                manifest = {
                    "schema_version": SCHEMA_VERSION, "stage": stage, "key": key, "digest": _digest(files),
                    "files": files, "result": dict(result), **about(),
                }  # fmt: skip
                write_synced(partial / MANIFEST, _sealed(manifest))
                final.parent.mkdir(parents=True, exist_ok=True)
                try:
                    partial.rename(final)
                except OSError as error:  # where locks do not work: another process was first, its artifact is as good
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        found = self.find(stage, key)
        assert found is not None
        return found

    def record(self, run_id: str, content: Mapping[str, Any]) -> None:
        """Write what a run has made so far: a report can be made from it at any time."""
        with _writing(self.root):
            write_synced(self.run_folder(run_id) / RUN, json.dumps(content, indent=1))

    def recorded(self, run_id: str) -> dict[str, Any]:
        """What `record` wrote. Raises StoreError when it cannot be read."""
        folder = self.root / "runs" / run_id
        try:
            content: dict[str, Any] = json.loads((folder / RUN).read_bytes())
            return content
        except (OSError, ValueError) as error:
            raise _damaged(folder, RUN, f"cannot be read: {error}") from error

    def runs(self) -> list[str]:
        """The ids of the runs, the newest last, without those that are one board's part of a run on several."""
        return sorted(file.parent.name for file in (self.root / "runs").glob(f"*/{RUN}"))

    def has_run(self, run_id: str) -> bool:
        """Whether there is a run of this id; that of one board among several is RUN/BOARD."""
        return (self.root / "runs" / run_id / RUN).is_file()

    def clean_work(self, key: str) -> None:
        """Drop the scratch space of a stage that is done; a waiting process may still hold the lock file."""
        for path in (self.root / "work" / key).glob("*"):
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def sha256_of(file: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def by_content(value: Any) -> Any:
    """`value` with the sha256 of the file in place of every path in it: what a file holds counts, not where it lies.

    Raises CheckpointError when there is no such file.
    """
    if isinstance(value, Mapping):
        return {key: by_content(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [by_content(one) for one in value]
    if not isinstance(value, Path):
        return value
    if not value.is_file():
        raise CheckpointError(
            f"{value}: there is no such file", allowed="a file that the recipe names", fix="correct its path"
        )
    return {"sha256": sha256_of(value)}


def _listed(folder: Path, file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    return {"path": str(file.relative_to(folder)), "sha256": sha256_of(file), "size_bytes": file.stat().st_size}


def _digest(files: list[dict[str, Any]]) -> str:
    made = [[file["path"], file["sha256"]] for file in files if not file["path"].startswith(f"{LOG}/")]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def write_synced(file: Path, text: str) -> None:
    """Write a text file so that a kill leaves either the old one or the new one."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(file)


def _sealed(manifest: Mapping[str, Any]) -> str:
    """A manifest as text that holds its own sha256: no byte of it can change unseen."""
    plain = json.loads(json.dumps(manifest))
    seal = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return json.dumps({**plain, "seal": seal}, indent=1, sort_keys=True)


def _unsealed(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact. Raises StoreError when it is not as it was written."""
    try:
        text = (folder / MANIFEST).read_bytes()
        manifest: dict[str, Any] = json.loads(text)
        if _sealed({key: value for key, value in manifest.items() if key != "seal"}).encode() == text:
            return manifest
        problem = "is not what was stored"
    except (OSError, ValueError, AttributeError) as error:
        problem = f"cannot be read: {error}"
    raise _damaged(folder, MANIFEST, problem)


def _damaged(folder: Path, name: str, problem: str) -> StoreError:
    return StoreError(
        f"{folder / name} {problem}",
        allowed="nothing in the store may change",
        fix=f"rm -r {shlex.quote(str(folder))}, then run again: it is made anew",
    )


FULL = "free some space, then run again: what is finished is kept"
ELSEWHERE = "choose another: --store FOLDER"
REFUSALS = {
    errno.ENOSPC: ("the disk is full", FULL),
    errno.EDQUOT: ("the disk quota is used up", FULL),
    errno.EACCES: ("it may not be written", ELSEWHERE),
    errno.EPERM: ("it may not be written", ELSEWHERE),
    errno.EROFS: ("its file system is read-only", ELSEWHERE),
    errno.ENOTDIR: ("a file stands where a folder is needed", ELSEWHERE),
    errno.EEXIST: ("a file stands where a folder is needed", ELSEWHERE),
}


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that says what to do."""
    try:
        yield
    except OSError as error:
        number, file = _refusal(error)
        # Reading the user's data may be refused as well, and is not the store's affair.
        if number not in REFUSALS or not (file or str(root)).startswith(str(root)):
            raise
        reason, fix = REFUSALS[number]
        raise StoreError(f"the store {root} cannot be used: {reason}", allowed=f"at {file or root}", fix=fix) from error


def _refusal(error: OSError) -> tuple[int | None, str]:
    """The number of what was refused, and the file that was written, if it is known; of a tree, the first one."""
    if isinstance(error, shutil.Error):  # a list of (source, target, text), or one of them
        told = error.args[0][0] if isinstance(error.args[0], list) else error.args
        found = re.match(r"\[Errno (\d+)\]", str(told[-1]))
        return int(found[1]) if found else None, str(told[1]) if len(told) == 3 else ""
    return error.errno, str(error.filename2 or error.filename or "")
