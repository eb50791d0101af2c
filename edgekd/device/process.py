"""One process and all its children: watched, bounded in time and output, and gone when we go."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgekd.errors import StageError

KEPT_STDERR_LINES = 30
STDOUT_LIMIT_BYTES = 16 << 20
LINE_LIMIT_BYTES = 1 << 16
GRACE_S = 2.0


@dataclass(frozen=True)
class Finished:
    """A process that ended by itself."""

    status: int
    stdout: str
    stderr_tail: tuple[str, ...]
    seconds: float

    def check(self, what: str) -> None:
        """Raise StageError with the process's last lines unless it ended well."""
        if self.status != 0:
            ended = f"signal {signal.Signals(-self.status).name}" if self.status < 0 else f"exit status {self.status}"
            fix = "mend what these lines say, and run it again"
            raise StageError(f"{what} failed ({ended})", allowed=last_lines(self.stderr_tail), fix=fix)


def last_lines(lines: Sequence[str]) -> str:
    """What a process said last, indented for an error message."""
    return "its last lines:\n" + "\n".join(f"         {line}" for line in lines[-8:]) if lines else "it said nothing"


def run(
    argv: Sequence[str],
    *,
    cwd: Path | None,
    timeout: float,
    on_stderr_line: Callable[[str], None] | None = None,
    name: str,
    heartbeat_s: float | None = None,
) -> Finished:
    """Run a command to its end; see `Job.run`. Errors call it `name`."""
    started = time.monotonic()
    try:
        # A session of its own: Ctrl-C in the terminal reaches only us, and we end the whole group.
        process = subprocess.Popen(
            argv, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise StageError(
            f"{argv[0]} cannot be run: {error.strerror}",
            allowed="it must be a program",
            fix="check that it is installed",
        ) from error
    assert process.stdout is not None and process.stderr is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    output = bytearray()
    readers = [
        threading.Thread(target=_read_lines, args=(process.stderr, lines), daemon=True),
        threading.Thread(target=_read_bytes, args=(process.stdout, output), daemon=True),
    ]
    for reader in readers:
        reader.start()
    tail: deque[str] = deque(maxlen=KEPT_STDERR_LINES)
    try:
        for line in _lines_until_the_end(process, lines, started + timeout, heartbeat_s):
            tail.append(line)
            if on_stderr_line:
                on_stderr_line(line)
        status = process.wait(max(0.0, started + timeout - time.monotonic()))
    except subprocess.TimeoutExpired:
        what = f"{name} did not end within {timeout:g} s"
        raise StageError(
            what, allowed=last_lines(list(tail)), fix="see whether the device is alive, and run it again"
        ) from None
    finally:
        _end(process)
        # A process that left the group may hold the pipes, and the readers, for longer: leave it to them.
        for reader in readers:
            reader.join(GRACE_S)
    stdout = output.decode("utf-8", "replace")
    return Finished(status, stdout, tuple(tail), time.monotonic() - started)


def _lines_until_the_end(
    process: subprocess.Popen[bytes],
    lines: queue.SimpleQueue[str | None],
    deadline: float,
    heartbeat_s: float | None,
) -> Iterator[str]:
    """The lines as they come, in our own thread: an error or Ctrl-C while one is handled is ours to see."""
    beat = time.monotonic()
    while time.monotonic() < deadline:
        if heartbeat_s and time.monotonic() > beat + heartbeat_s:
            beat = time.monotonic()
            _say_we_live(process)
        try:
            line = lines.get(timeout=0.1)
        except queue.Empty:
            if process.poll() is not None:  # but a grandchild keeps standard error open
                deadline = min(deadline, time.monotonic() + GRACE_S)
            continue
        if line is None:
            return
        yield line
    if process.poll() is None:
        raise subprocess.TimeoutExpired(process.args, 0)


def _say_we_live(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has just ended
        process.stdin.write(b".")
        process.stdin.flush()


def _read_lines(stream: IO[bytes], lines: queue.SimpleQueue[str | None]) -> None:
    with stream:
        # readline(limit): a process that never ends its line must not fill our memory.
        for raw in iter(lambda: stream.readline(LINE_LIMIT_BYTES), b""):
            lines.put(raw.decode("utf-8", "replace").rstrip("\n"))
    lines.put(None)


def _read_bytes(stream: IO[bytes], output: bytearray) -> None:
    with stream:
        for chunk in iter(lambda: stream.read(1 << 16), b""):
            output += chunk[: max(0, STDOUT_LIMIT_BYTES + 1 - len(output))]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the process's group go: its standard input is closed, then TERM, then KILL."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
