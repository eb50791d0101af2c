"""The system's ssh client: one shared connection to a machine, conversations over it, and its complaints explained."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import shlex
import subprocess
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from edgekd.device import porter, signers
from edgekd.device.process import last_lines
from edgekd.errors import MissingError, StageError

CONNECT_TIMEOUT_S = 15
HELLO_TIMEOUT_S = 60.0  # until a loaded board has started its Python
PATIENCE_S = 300.0  # with one step of a conversation: a slow card may write for minutes
KEEPALIVE_S, KEEPALIVES = 5, 3  # a peer that is silent for 15 s is gone
HANG_UP_S = 2.0
SSH_FAILED = 255  # the exit status of ssh when it, and not the command, failed
REPLY_LIMIT_BYTES = 1 << 20
OLDEST_PYTHON = (3, 8)
# Ours win over the user's configuration: no questions, no unknown host, nothing forwarded to the board.
OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": CONNECT_TIMEOUT_S,
    "ServerAliveInterval": KEEPALIVE_S,
    "ServerAliveCountMax": KEEPALIVES,
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ClearAllForwardings": "yes",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "ControlPersist": "no",
}
# A Python of any age must read this. It says who it is and stays, which keeps the connection open until we go.
HELLO = (
    "import json,os,sys;sys.stdout.write(json.dumps([sys.executable,list(sys.version_info[:3]),"
    "os.path.expanduser(chr(126))])+chr(10));sys.stdout.flush();sys.stdin.read()"
)
OWN_PYTHON = 'p="$HOME/.edgekd/venv/bin/python"; [ -x "$p" ] || p=python3; exec "$p"'


class UnreachableError(MissingError):
    """Nobody answers at the address, now."""


class CutError(Exception):
    """A conversation ended before its end: (ssh's exit status, the last lines that it or the board said)."""

    def __init__(self, status: int, lines: list[str]) -> None:
        super().__init__(status, lines)
        self.status, self.lines = status, lines


@dataclass(frozen=True)
class Address:
    """Where a device is, and by which configuration: what stands in its URL."""

    url: str
    host: str
    user: str | None
    port: int | None
    config: str
    python: str

    def client(self) -> list[str]:
        """The ssh command that logs in there, as a user would type it."""
        where = f"{self.user}@{self.host}" if self.user else self.host
        config, port = ["-F", self.config] if self.config else [], ["-p", str(self.port)] if self.port else []
        return ["ssh", *config, *port, where]


class Connection:
    """One ssh connection that all commands share. It lives as long as this process, or until `close`."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._socket = Path()
        self._master: Conversation | None = None
        self.python = self.home = ""

    @property
    def alive(self) -> bool:
        """Whether it was opened and still stands."""
        return self._master is not None and self._master.running

    def ends(self, within_s: float) -> bool:
        """Whether it has been lost, or is found to be so in this time."""
        return self._master is None or self._master.ends(within_s)

    def open(self) -> None:
        """Connect and find the board's Python. Raises MissingError with what to do when that fails."""
        self.close()
        self._socket = _socket_folder() / secrets.token_hex(4)
        start = f"exec {shlex.quote(self.address.python)}" if self.address.python else OWN_PYTHON
        remote = "exec /bin/sh -c " + shlex.quote(f'{start} -c "{HELLO}"')
        said = b""
        try:
            self._master = Conversation(self.argv(remote, master=True))
            said = self._master.line(HELLO_TIMEOUT_S)
            self.python, version, self.home = json.loads(said)
        except CutError as error:
            self.close()
            raise self._not_opened(error) from None
        except (ValueError, TypeError):
            self.close()
            raise MissingError(
                f'device "{self.address.url}": its login shell prints before a command runs: {said[:60]!r}',
                allowed="a shell that is not interactive must print nothing, or no program can be spoken to",
                fix="move what prints out of ~/.bashrc (or below its test for an interactive shell)",
            ) from None
        if tuple(version) < OLDEST_PYTHON:
            self.close()
            raise MissingError(
                f'device "{self.address.url}": its Python is {".".join(map(str, version))}',
                allowed=f"at least {'.'.join(map(str, OLDEST_PYTHON))} is needed there",
                fix=f"install a newer one beside it and name it: {self.address.url}?python=/usr/bin/python3.8",
            )

    def argv(self, remote: str, *, master: bool = False) -> list[str]:
        """The command here that runs the shell command `remote` there."""
        ssh, *rest = self.address.client()
        options = OPTIONS | {"ControlMaster": "yes" if master else "no", "ControlPath": self._socket}
        if not master:  # where the shared connection is gone, ssh would silently open one of its own
            options["ProxyCommand"] = "false"
        given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return [ssh, "-T", *given, *rest[:-1], "--", rest[-1], remote]

    def request(self, do: str, **arguments: Any) -> list[str]:
        """The command here that lets the porter do something there."""
        asked = base64.b64encode(json.dumps({"do": do, **arguments}).encode()).decode()
        return self.argv(f"exec {shlex.quote(self.python)} -c {shlex.quote(program())} {asked}")

    def close(self) -> None:
        """Let it go."""
        if self._master:
            self._master.__exit__()
        self._master = None

    def _not_opened(self, error: CutError) -> MissingError:
        address = self.address
        if error.status in (126, 127):
            named = address.python or "python3"
            return MissingError(
                f'device "{address.url}": there is no {named}',
                allowed="edgekd needs Python 3.8 or newer there, and nothing else to begin with",
                fix="log in and install it: sudo apt-get install python3",
            )
        if error.status != SSH_FAILED and error.status >= 0:
            return MissingError(
                f'device "{address.url}": its Python ended with exit status {error.status}',
                allowed=last_lines(error.lines),
                fix=f"see for yourself: {shlex.join([*address.client(), address.python or 'python3', '--version'])}",
            )
        return explained(address, "\n".join(error.lines))


def program() -> str:
    """The porter, with what it needs, in Python that fits into a command."""
    texts = b"\0".join(Path(file).read_bytes() for file in (signers.__file__, porter.__file__))
    packed = base64.b64encode(zlib.compress(texts, 9)).decode()
    return f'import base64,zlib\nfor text in zlib.decompress(base64.b64decode("{packed}")).split(b"\\0"): exec(text)'


class Conversation:
    """A command whose input and output are ours to write and read; gone at the end of the `with` block."""

    def __init__(self, argv: list[str]) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,
                env=os.environ | {"SSH_ASKPASS_REQUIRE": "never"},  # nor may a jump host's ssh, by a dialogue
            )
        except OSError as error:
            self._errors.close()
            raise MissingError(
                f"{argv[0]} cannot be run: {error.strerror}",
                allowed="boards are reached through the system's OpenSSH client",
                fix="sudo apt-get install openssh-client",
            ) from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._in, self._out, self._errors):
            with contextlib.suppress(OSError):  # what could not be written before the connection was lost
                stream.close()
        self._process.kill()
        self._process.wait()

    @property
    def running(self) -> bool:
        """Whether the command still runs."""
        return self._process.poll() is None

    def ends(self, within_s: float) -> bool:
        """Whether the command ends in this time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        return not self.running

    def line(self, patience: float = PATIENCE_S) -> bytes:
        """The next line that it writes. Raises CutError when it ends or is silent instead."""
        with self._within(patience):
            line = self._out.readline(REPLY_LIMIT_BYTES)
        if len(line) == REPLY_LIMIT_BYTES:
            raise ValueError(f"a line of more than {REPLY_LIMIT_BYTES} bytes")
        return line if line.endswith(b"\n") else self._cut()

    def reply(self) -> dict[str, Any]:
        """The next message of the porter. Raises porter.RefusedError when it says so, CutError when there is none."""
        message = json.loads(self.line())
        if not isinstance(message, dict):
            raise ValueError(f"a JSON {type(message).__name__}, not an object")
        if "refused" in message:
            raise porter.RefusedError(*message["refused"])
        return message

    def say(self, message: Any) -> None:
        """Send a message."""
        self.write(json.dumps(message).encode() + b"\n")

    def read(self, size: int) -> bytes:
        """That many bytes. Raises CutError when there are fewer."""
        with self._within(PATIENCE_S):
            found = self._out.read(size)
        return found if len(found) == size else self._cut()

    def write(self, data: bytes) -> None:
        """Hand it all over. When the other side does not want it, `reply` says why."""
        try:
            with self._within(PATIENCE_S):
                self._in.write(data)
                self._in.flush()
        except OSError:
            self.reply()
            self._cut()

    def hang_up(self) -> None:
        """Let the other side come to its end by itself."""
        with contextlib.suppress(OSError):
            self._in.close()
        self.ends(HANG_UP_S)

    def beat(self) -> None:
        """Say that we are here, to whoever still listens."""
        with contextlib.suppress(OSError):
            self._in.write(b".")
            self._in.flush()

    @contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _cut(self) -> Any:
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read(1 << 16).decode("utf-8", "replace")
        raise CutError(status, [line.rstrip() for line in said.splitlines() if line.strip()])


class Held:
    """A command on the board that has what it asked for as long as it hears from us.

    Raises porter.RefusedError when it does not get it, CutError when there is no answer.
    """

    def __init__(self, argv: list[str]) -> None:
        self._talk, self._over = Conversation(argv), threading.Event()
        try:
            self._talk.reply()
        except BaseException:
            self._talk.__exit__()
            raise
        self._pulse = threading.Thread(target=self._beat, daemon=True)
        self._pulse.start()

    def _beat(self) -> None:
        while not self._over.wait(porter.HEARTBEAT_S):
            self._talk.beat()

    def close(self) -> None:
        """Let it go."""
        self._over.set()
        self._pulse.join()
        self._talk.hang_up()
        self._talk.__exit__()


def _socket_folder() -> Path:
    """Private, and short: the path of a socket has about a hundred characters."""
    folder = Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp"), f"edgekd-{os.getuid()}")
    if len(str(folder)) > 60:
        folder = Path("/tmp", folder.name)
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise StageError(
            f"{folder} does not belong to you alone",
            allowed="edgekd keeps its ssh connections there",
            fix=f"delete it, or see who made it: ls -ld {folder}",
        )
    return folder


# ---------------------------------------------------------------- what ssh says, in three parts

_LOGIN = "see for yourself: {login}"
# (what ssh writes, what that means, what to do); the first that matches counts.
_NETWORK = (
    ("Could not resolve hostname", 'the host name "{host}" is not known',
     "correct the name, or give the address: ssh://USER@192.168.0.10"),
    ("Connection refused", "nobody listens there: the connection is refused",
     "see whether it has started and runs an ssh server (sudo systemctl enable --now ssh), and its port"),
    ("timed out|not responding|No route to host|Network is unreachable|Host is down", "it does not answer",
     "see whether it is switched on and in the same network: ping {host}"),
    ("Connection (reset|closed)|Broken pipe|kex_exchange", "the connection was closed at once", _LOGIN),
)  # fmt: skip
_LOGGING_IN = (
    ("HOST IDENTIFICATION HAS CHANGED", "its host key has changed since you last logged in",
     "if it was set up anew: {forget} && {login}; if not, somebody else answers in its place"),
    ("Host key verification failed|host key is known", "its host key is not known here",
     "log in once by hand and compare the key that is shown: {login}"),
    (r"Permission denied", "it does not let you in: {line}",
     "give it your key: ssh-copy-id {target}   (no password is ever asked for; a key's passphrase is ssh-agent's)"),
)  # fmt: skip


def explained(address: Address, said: str) -> MissingError:
    """What kept us from logging in."""
    lines = [line for line in said.splitlines() if line.strip()] or ["ssh said nothing"]
    client = address.client()
    forget = re.search(r"ssh-keygen .*-R .*", said)
    known = {
        "host": address.host,
        "line": lines[-1],
        "login": shlex.join(client),
        "target": shlex.join(client[1:]),
        "forget": forget.group().strip() if forget else f"ssh-keygen -R {shlex.quote(address.host)}",
    }
    for kind, table in ((MissingError, _LOGGING_IN), (UnreachableError, _NETWORK)):
        for pattern, what, fix in table:
            if re.search(pattern, said):
                return kind(
                    f'device "{address.url}": {what.format(**known)}',
                    allowed=f"ssh says: {lines[-1]}",
                    fix=fix.format(**known),
                )
    return MissingError(
        f'device "{address.url}": ssh could not log in', allowed=f"ssh says: {lines[-1]}", fix=_LOGIN.format(**known)
    )
