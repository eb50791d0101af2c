"""A machine to run things on: this one, or a board, behind one class. The URL's scheme chooses the transport.

device = Device("local:", workdir)
with device.job() as job:
    job.put({"student": folder})
    job.run([job.python, "-m", "agent", "bench", "spec.json"], timeout=60)
    job.get("result.json", path)
"""

from __future__ import annotations

import getpass
import json
import secrets
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import parse_qsl

import edgekd
from edgekd import registry
from edgekd.artifact import sha256_of
from edgekd.device import signers
from edgekd.device.facts import Facts
from edgekd.device.process import Finished, last_lines, run
from edgekd.device.signature import sign
from edgekd.documents import fitting, parsed, printable
from edgekd.errors import ConnectionLost, DiskFull, RecipeError, StageError, unknown_key

__all__ = [
    "AGENT", "BusyError", "Device", "Finished", "Job", "Transport", "disk_full", "files_below", "free_some_space",
    "last_lines", "not_fetched", "not_signed", "text_from_holder", "wait_for",
]  # fmt: skip

AGENT = Path(edgekd.__file__).with_name("agent")
FACTS_TIMEOUT_S = 180.0  # a slow board that is busy
TURN_PATIENCE_S = 12 * 3600.0  # a job that others wait for may measure for hours
TURN_EVERY_S = 2.0


class BusyError(Exception):
    """The device belongs to another job now; the argument is who has it."""

    def __init__(self, who: Mapping[str, str]) -> None:
        super().__init__(who)
        self.who = text_from_holder(who)


class Transport(ABC):
    """How to reach a machine. Registered by its URL scheme as `@register("transport", SCHEME)`; made from the URL.

    It connects when it is first used. Paths on the device are strings in its own notation; `folder` is one that
    `make_folder` returned, `name` is a relative path below it. What cannot reach the device raises MissingError when it
    never could, ConnectionLost when it could before.
    """

    # The ssh key that signs what is run there; empty for none.
    signing_key: str = ""
    # How often a command's standard input must hear from us, when that tells the device that we are alive.
    heartbeat_s: ClassVar[float | None] = None
    # Whether it is no machine but the record of one: engines stay where they were built.
    recorded: ClassVar[bool] = False

    @property
    @abstractmethod
    def python(self) -> str:
        """The Python interpreter on the device."""

    @abstractmethod
    def make_folder(self, name: str = "") -> str:
        """Make a folder on the device, private to us; return its path.

        It is fresh and empty; by the same `name`, it is the one that an interrupted job has left not long ago, if any.
        """

    @abstractmethod
    def remove_folder(self, folder: str) -> None:
        """End what still runs there, and delete the folder and everything in it."""

    @abstractmethod
    def lock(self, owner: Mapping[str, str]) -> None:
        """Keep other jobs off the device, until `unlock` or our own end. Raises BusyError with who has it."""

    @abstractmethod
    def unlock(self) -> None:
        """Let other jobs come."""

    @abstractmethod
    def holder(self) -> dict[str, str]:
        """Who has locked the device: user, host, since; empty when nobody has."""

    @abstractmethod
    def put(self, sources: Mapping[str, Path], folder: str) -> None:
        """Copy files, and folders with everything in them, to the device; by their names there."""

    def kept(self, files: Sequence[str]) -> set[str]:
        """Those of these files, all by their sha256, that the device has from before: `put` needs no room for them
        there but that of the copy in the folder."""
        return set()

    @abstractmethod
    def get(self, folder: str, name: str, target: Path, limit_bytes: int) -> None:
        """Copy one file from the device. Raises StageError when it is absent or larger than the limit."""

    @abstractmethod
    def command(self, argv: Sequence[str], folder: str) -> tuple[list[str], Path | None]:
        """The command on this machine, and where to run it, that runs `argv` in `folder` on the device.

        It must hand standard input, output and error through, and end what runs on the device when it ends itself or
        its standard input closes. What the device's owner asks to be signed it must not run when it is not, see
        signers.signer_of.
        """

    def ended(self, finished: Finished) -> Finished:
        """What the end of such a command means for the one on the device: a negative status is a signal's number.

        Raises ConnectionLost when it has not ended there, StageError when it was not run because it is not signed.
        """
        return finished


class Device:
    """A machine, by URL: SCHEME:..., with options of its transport as ?NAME=VALUE&...

    Raises RecipeError when no transport has the URL's scheme, or it has no such option.
    """

    def __init__(self, url: str, workdir: Path, options: Mapping[str, Any] | None = None) -> None:
        self.url = url
        address, _, query = url.partition("?")
        scheme, given = url.partition(":")[0], {**dict(parse_qsl(query)), **(options or {})}
        try:
            known = registry.entry("transport", scheme, "its scheme").options
            for name in (name for name in given if name not in known):
                raise unknown_key("", name, known, of=f"transport {scheme}", fix="see: edgekd list transports")
        except RecipeError as error:  # not of the recipe's file
            raise RecipeError(f"device {url!r}: {error.what}", allowed=error.allowed, fix=error.fix) from None
        self.transport: Transport = registry.create("transport", scheme, address, workdir, options=given)

    @contextmanager
    def job(self, name: str = "") -> Iterator[Job]:
        """A folder on the device, deleted at the end.

        With a `name` it outlives a lost connection, a full disk and Ctrl-C for a while; the next of that name goes on.
        """
        folder = self.transport.make_folder(name)
        keep = False
        try:
            yield Job(self, folder)
        except (ConnectionLost, DiskFull, KeyboardInterrupt):
            keep = bool(name)
            raise
        finally:
            if not keep:
                self.transport.remove_folder(folder)

    @contextmanager
    def reserved(self, on_wait: Callable[[str], None]) -> Iterator[None]:
        """No other job comes to the device meanwhile. While one has it, wait, and tell for whom.

        Raises StageError when that takes too long.
        """
        owner = {
            "user": getpass.getuser(), "host": socket.gethostname(), "token": secrets.token_hex(16),
            "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }  # fmt: skip
        wait_for(lambda: self.transport.lock(owner), self.url, on_wait)
        try:
            yield
        finally:
            self.transport.unlock()

    def facts(self) -> dict[str, Any]:
        """What machine it is and how it is doing now, found out by the agent on the machine itself."""
        with self.job() as job:
            job.put({"agent": AGENT})
            finished = job.run([job.python, "-m", "agent", "facts"], timeout=FACTS_TIMEOUT_S)
        finished.check(f"the agent on {self.url}")
        source = f"the facts of {self.url}"
        return fitting(parsed(finished.stdout, source), Facts, source)


def wait_for(lock: Callable[[], None], url: str, on_wait: Callable[[str], None]) -> None:
    """Try to lock a device until it is free. Raises StageError when that takes too long."""
    deadline = time.monotonic() + TURN_PATIENCE_S
    while True:
        try:
            return lock()
        except BusyError as busy:
            if time.monotonic() > deadline:
                raise StageError(
                    f'device "{url}" is in use by {busy.who}',
                    allowed=f"one job at a time has a device; waited {TURN_PATIENCE_S / 3600:g} hours",
                    fix="ask whose it is, and run it again",
                ) from None
            on_wait(f"waiting: in use by {busy.who}")
            time.sleep(TURN_EVERY_S)


def text_from_holder(who: Mapping[str, str]) -> str:
    """`anna@laptop since 2026-01-31 14:03 UTC`; what is written there may be anybody's."""
    return printable(f"{who.get('user', '')}@{who.get('host', '')} since {who.get('since', '')}")


class Job:
    """A folder on a device, and what is run in it: signed by the key in the device's URL, where there is one."""

    def __init__(self, device: Device, folder: str) -> None:
        self.device, self.folder = device, folder
        self._files: dict[str, str] = {}  # sha256 by path, of what shall stay as it was put
        self._signed: dict[str, str] = {}  # ... as it was when it was last signed

    @property
    def python(self) -> str:
        """The Python interpreter on the device."""
        return self.device.transport.python

    def put(self, sources: Mapping[str, Path], *, changes: bool = False) -> None:
        """Copy files and folders, by their names relative to the job's folder.

        changes: what runs there may write them anew, so that their content is not signed.
        """
        inside = {_inside(name): source for name, source in sources.items()}
        self.device.transport.put(inside, self.folder)
        if self.device.transport.signing_key and not changes:
            self._files |= {name: sha256_of(file) for name, file in files_below(inside).items()}

    def get(self, name: str, target: Path, *, limit_bytes: int) -> None:
        """Copy the file `name` to `target`. Raises StageError when it is absent or larger than the limit."""
        self.device.transport.get(self.folder, _inside(name), target, limit_bytes)

    def run(
        self, argv: Sequence[str], *, timeout: float, on_stderr_line: Callable[[str], None] | None = None
    ) -> Finished:
        """Run a command in the job's folder and wait for it.

        It and its children are ended when the time is over, on Ctrl-C and on any error here. Its standard input stays
        open as long as we live. Raises StageError on time-out, and where it must be signed and is not; ConnectionLost
        when the device is gone.
        """
        transport = self.device.transport
        if self._files != self._signed:
            self._sign()
        command, cwd = transport.command(argv, self.folder)
        finished = run(
            command,
            cwd=cwd,
            timeout=timeout,
            on_stderr_line=on_stderr_line,
            name=" ".join(argv),
            heartbeat_s=transport.heartbeat_s,
        )
        return transport.ended(finished)

    def _sign(self) -> None:
        """Put a signed manifest beside what was put."""
        with tempfile.TemporaryDirectory() as folder:
            manifest = Path(folder, signers.MANIFEST)
            manifest.write_text(json.dumps({"files": self._files}, indent=1, sort_keys=True), encoding="utf-8")
            signature = sign(manifest, self.device.transport.signing_key)
            self.device.transport.put({file.name: file for file in (manifest, signature)}, self.folder)
        self._signed = dict(self._files)


def files_below(sources: Mapping[str, Path]) -> dict[str, Path]:
    """The files, and all below the folders, by their path on a device."""
    found = {}
    for name, source in sources.items():
        for file in [source] if source.is_file() else sorted(source.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                found[name if file == source else f"{name}/{file.relative_to(source).as_posix()}"] = file
    return found


def _inside(name: str) -> str:
    """A relative path that stays in its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name!r} is not a path inside the job's folder")
    return str(path)


def not_fetched(name: str, folder: str, limit_bytes: int, size: int | None = None) -> StageError:
    """Why a file was not fetched: it is absent, or it has `size` bytes."""
    if size is None:
        return StageError(
            f"{name} was not written on the device", allowed=f"looked in {folder}", fix="measure again: edgekd bench"
        )
    return StageError(
        f"{name} from the device has {size} bytes",
        allowed=f"at most {limit_bytes} are expected",
        fix="see what the device writes, and measure again",
    )


def disk_full(url: str, place: str, free: int, lacking: int) -> DiskFull:
    """Why a device does not take what is written to `place` there. lacking: bytes, 0 where nobody knows."""
    needed = f", {lacking / 1e6:.1f} MB needed" if lacking else ""
    what = f'device "{url}": its disk is full: {free / 1e6:.1f} MB free{needed}'
    return DiskFull(what, allowed=f"below {place}", fix=free_some_space(url))


def free_some_space(url: str) -> str:
    """What to do about a full disk on a device."""
    ours = "" if url.startswith("local:") else " (what edgekd keeps of earlier runs: rm -r ~/.edgekd/files)"
    return f"free some space there{ours}, and run it again: what was measured is kept for an hour"


def not_signed(url: str, why: str) -> StageError:
    """Why a device does not run what it was sent, in its own words."""
    sign_it = "sign it: --device 'ssh://...?signing_key=~/.ssh/id_ed25519', by a key that the board's owner has listed"
    leave_it = "leave signing_key out of the device's URL, or have its owner list your key there"
    return StageError(
        f'device "{url}": {why}',
        allowed="its owner lists the keys whose signature it asks for; see docs/boards.md, Signed bundles",
        fix=leave_it if "nobody would check" in why else sign_it,
    )
