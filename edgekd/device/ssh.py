"""A board over the system's OpenSSH client, so that ~/.ssh/config, agents, security keys and jump hosts just work.

Nothing is installed on the board: each command brings the text of `porter.py` along, which the board's own Python runs.
All that is kept there is below ~/.edgekd.
"""

from __future__ import annotations

import hashlib
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from edgekd.artifact import sha256_of
from edgekd.device import BusyError, Transport, disk_full, files_below, not_fetched, not_signed, porter, wait_for
from edgekd.device.openssh import SSH_FAILED, Address, Connection, Conversation, CutError, Held, UnreachableError
from edgekd.device.process import Finished, last_lines
from edgekd.errors import ConnectionLost, EdgekdError, RecipeError, StageError
from edgekd.registry import register

T = TypeVar("T")
_log = logging.getLogger(__name__)

RECONNECT_S = 90.0  # a board that was there may need so long to come back: it restarts
RECONNECT_EVERY_S = 2.0
ATTEMPTS = 5  # of one request, when the connection comes back each time and is lost again
NOTICE_S = 1.0  # until ssh itself has noticed what a command of it died of


@dataclass(frozen=True)
class _File:
    path: Path
    sha256: str
    size: int


@register("transport", "ssh")
class Ssh(Transport):
    """A board by the system's ssh client: ssh://[USER@]HOST[:PORT][?python=PATH&config=FILE&signing_key=FILE].

    python: the board's interpreter, instead of ~/.edgekd/venv's or python3; config: instead of ~/.ssh/config;
    signing_key: the ssh key that signs what is run there, for a board whose owner asks for that.
    """

    heartbeat_s = porter.HEARTBEAT_S

    def __init__(self, url: str, workdir: Path, *, config: str = "", python: str = "", signing_key: str = "") -> None:
        del workdir  # nothing is kept on this side
        self.signing_key = signing_key
        self._address = _address(url, config, python)
        self._connection = Connection(self._address)
        self._known = False
        self._owner: Mapping[str, str] | None = None
        self._held: Held | None = None
        weakref.finalize(self, self._connection.close)

    @property
    def python(self) -> str:
        """The board's interpreter."""
        return self._connected().python

    def make_folder(self, name: str = "") -> str:
        """A folder below ~/.edgekd/jobs."""
        folder: str = self._retried(lambda: self._ask("make", root=self._root, name=name))
        return folder

    def remove_folder(self, folder: str) -> None:
        """End what still runs in it and delete it; when the board is gone now, the next run there does so."""
        try:
            if not self._connection.alive:
                self._connection.open()
            self._ask("remove", root=self._root, folder=folder)
        except EdgekdError as error:
            _log.warning("%s stays on %s until the next run there: %s", folder, self._address.url, error.what)

    def lock(self, owner: Mapping[str, str]) -> None:
        """A process on the board holds the lock, as long as it hears from us; after a lost connection, another one."""
        self._retried(lambda: self._lock(owner))
        self._owner = owner

    def unlock(self) -> None:
        """End that process."""
        self._owner = None
        if self._held:
            self._held.close()
            self._held = None

    def holder(self) -> dict[str, str]:
        """Who has locked the board."""
        found: dict[str, str] = self._retried(lambda: self._ask("holder"))
        return found

    def _lock(self, owner: Mapping[str, str]) -> None:
        if self._held:
            self._held.close()
        try:
            with self._explained():
                self._held = Held(self._connected().request("hold", owner=dict(owner)))
        except porter.RefusedError as error:
            raise BusyError(error.args[1]) from None

    def put(self, sources: Mapping[str, Path], folder: str) -> None:
        """Send what the board has not got yet; after a lost connection, go on where it stopped."""
        files = _files(sources)
        self._retried(lambda: self._send(files, folder))

    def kept(self, files: Sequence[str]) -> set[str]:
        """What was ever sent, and not deleted since."""
        return set(self._retried(lambda: self._ask("kept", root=self._root, files=list(files))))

    def get(self, folder: str, name: str, target: Path, limit_bytes: int) -> None:
        """Fetch one file and verify its sha256."""
        try:
            self._retried(lambda: self._fetch(folder, name, target, limit_bytes))
        except porter.RefusedError as error:  # absent, or large with its size
            raise not_fetched(name, folder, limit_bytes, *error.args[1:]) from None

    def command(self, argv: Sequence[str], folder: str) -> tuple[list[str], Path | None]:
        """The ssh command that lets the porter run `argv` there."""
        return self._connected().request("run", folder=folder, argv=list(argv)), None

    def ended(self, finished: Finished) -> Finished:
        """Tell a lost connection, and what was not run, from a command that failed."""
        if finished.status == porter.UNSIGNED and finished.stderr_tail:
            raise not_signed(self._address.url, finished.stderr_tail[-1])
        if finished.status == SSH_FAILED and self._connection.ends(within_s=NOTICE_S):
            raise self._lost(list(finished.stderr_tail))
        return replace(finished, status=128 - finished.status) if 128 < finished.status < 128 + 64 else finished

    # ---------------------------------------------------------------- requests to the porter

    @property
    def _root(self) -> str:
        return f"{self._connected().home}/.edgekd"

    def _ask(self, do: str, **arguments: Any) -> Any:
        with self._talk(do, **arguments) as talk:
            return talk.reply()["done"]

    def _send(self, files: dict[str, _File], folder: str) -> None:
        by_sha256 = {file.sha256: file for file in files.values()}
        with self._talk("receive", root=self._root, folder=folder) as talk:
            talk.say({path: [file.sha256, file.size] for path, file in files.items()})
            wanted, sent = talk.reply(), 0
            for sha256, here in wanted.items():
                file = by_sha256[sha256]
                with file.path.open("rb") as stream:
                    stream.seek(here)
                    for chunk in iter(lambda: stream.read(porter.CHUNK_BYTES), b""):
                        talk.write(chunk)
                        sent += len(chunk)
            talk.reply()
        all_bytes = sum(file.size for file in by_sha256.values())
        _log.info("%s: %d bytes sent, %d were there", self._address.url, sent, all_bytes - sent)

    def _fetch(self, folder: str, name: str, target: Path, limit_bytes: int) -> None:
        with self._talk("fetch", folder=folder, name=name, limit=limit_bytes) as talk:
            left, digest = min(int(talk.reply()["bytes"]), limit_bytes), hashlib.sha256()
            part = target.with_name(target.name + ".part")
            with part.open("wb") as file:
                while left:
                    chunk = talk.read(min(left, porter.CHUNK_BYTES))
                    digest.update(chunk)
                    left -= file.write(chunk)
            if talk.reply()["sha256"] != digest.hexdigest():
                raise self._lost([f"{name} arrived damaged"])
            part.replace(target)

    @contextmanager
    def _talk(self, do: str, **arguments: Any) -> Iterator[Conversation]:
        """A conversation with the porter."""
        with self._explained(), Conversation(self._connected().request(do, **arguments)) as talk:
            yield talk

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong in a conversation comes out in our words."""
        try:
            yield
        except CutError as error:
            if error.status == SSH_FAILED or error.status < 0 or self._connection.ends(within_s=NOTICE_S):
                raise self._lost(error.lines) from None
            what = f'device "{self._address.url}": its Python ended with exit status {error.status}'
            raise StageError(what, allowed=last_lines(error.lines), fix="see: edgekd doctor --device URL") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f'device "{self._address.url}": what it answers is not understood: {error}'
            fix = "see what else prints there: edgekd doctor --device URL"
            raise StageError(what, allowed="expected: lines of JSON", fix=fix) from error
        except porter.RefusedError as error:
            raise self._refused(error) from None

    def _refused(self, error: porter.RefusedError) -> Exception:
        reason, *details = error.args
        if reason == "disk full":
            return disk_full(self._address.url, *details)
        if reason == "system":
            what = f'device "{self._address.url}": {details[0]}'
            return StageError(what, allowed=f"below {self._root}", fix="mend that on the device, and run it again")
        if reason == "corrupt":
            return self._lost([f"{details[0]} arrived damaged"])
        return error

    # ---------------------------------------------------------------- connections that come and go

    def _connected(self) -> Connection:
        """The connection: opened at first use, and again, with patience, after it was lost."""
        deadline = time.monotonic() + RECONNECT_S
        while not self._connection.alive:
            try:
                self._connection.open()
                if owner := self._owner:  # whoever waited for us may have come meanwhile
                    wait_for(lambda: self._lock(owner), self._address.url, _log.warning)
            except (UnreachableError, ConnectionLost) as error:
                self._connection.close()
                if not self._known:
                    raise
                if time.monotonic() > deadline:
                    raise self._lost([error.what]) from None
                time.sleep(RECONNECT_EVERY_S)
        self._known = True
        return self._connection

    def _retried(self, request: Callable[[], T]) -> T:
        """Ask again when the connection was lost: every request can be repeated."""
        for _ in range(ATTEMPTS - 1):
            self._connected()  # not in the request: what does not come back is not waited for again
            try:
                return request()
            except ConnectionLost as error:
                _log.warning("%s: %s; trying again", error.what, error.allowed)
        return request()

    def _lost(self, lines: list[str]) -> ConnectionLost:
        return ConnectionLost(
            f'device "{self._address.url}": the connection was lost',
            allowed=last_lines(lines),
            fix="see whether it is on and in the network, and run it again: what was sent and measured is kept there",
        )


def _address(url: str, config: str, python: str) -> Address:
    """The parts of ssh://[USER@]HOST[:PORT]. Raises RecipeError for anything else."""
    try:
        parts = urlsplit(url)
        host, user, port = parts.hostname, parts.username, parts.port
        good = host and not host.startswith("-") and not (user or "").startswith("-") and parts.path in ("", "/")
        if not good or parts.password is not None or parts.fragment:
            raise ValueError("a host is missing, or something stands behind it")
    except ValueError as error:
        raise RecipeError(
            f"device {url!r} is not valid: {error}",
            allowed="expected: ssh://[USER@]HOST[:PORT], without a password: keys and their agent do that",
            fix="as in --device ssh://pi@raspberrypi.local",
        ) from None
    assert host is not None
    # urlsplit folds the case, which matters to the names in ~/.ssh/config.
    start = parts.netloc.lower().rindex(host)
    return Address(url, parts.netloc[start : start + len(host)], user, port, config, python)


def _files(sources: Mapping[str, Path]) -> dict[str, _File]:
    """The files, and all below the folders, by their path on the device."""
    found = {}
    for name, path in files_below(sources).items():
        found[name] = _File(path, sha256_of(path), path.stat().st_size)
    return found
