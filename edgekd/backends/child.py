"""A compiler's process: what crashes or hangs in there is an error here, with its last lines."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.artifact import FULL
from edgekd.errors import StageError

LAST_LINES = 8
WATCH_S = 0.5  # between two looks at what a process reports of itself


def result_of(
    argv: Sequence[str],
    result: Path,
    *,
    what: str,
    fix: str,
    timeout: float,
    log: Path | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    expected: Container[int] = (0,),
    watch: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run a program and read the JSON object that it leaves in the file `result`.

    what: the program and its task, as "tvm, compiling student.onnx"; log: where all that it prints is kept, by default
    for the error alone; environment: variables beside our own; expected: exit statuses that are no failure;
    watch: called again and again while it runs.

    Raises StageError when it crashes, takes longer than `timeout` seconds or leaves no result.
    """
    said = log or result.with_suffix(".log")
    how = ended(argv, said, timeout, cwd=cwd, environment=environment, expected=expected, watch=watch)
    if how or not result.is_file():
        lines = last_lines(said)
        raise StageError(
            f"{what}: it {how or 'ended without a result'}",
            allowed=lines + (f"\n       all of them: {log}" if log else ""),
            fix=FULL if os.strerror(errno.ENOSPC) in lines else fix,
        )
    content: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return content


def ended(
    argv: Sequence[str],
    log: Path,
    timeout: float,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    expected: Container[int] = (0,),
    watch: Callable[[], None] | None = None,
) -> str:
    """Run a program with its output in `log`; how it ended when that was not by itself with an expected status."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})}, start_new_session=True,
        )  # fmt: skip
        try:
            status = _wait(process, timeout, watch or (lambda: None))
        except subprocess.TimeoutExpired:
            return f"did not end within {timeout:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status < 0:
        return f"crashed ({signal.Signals(-status).name})"
    return "" if status in expected else f"ended with exit status {status}"


def _wait(process: subprocess.Popen[bytes], timeout: float, watch: Callable[[], None]) -> int:
    """The exit status. Raises TimeoutExpired."""
    until = time.monotonic() + timeout
    while (left := until - time.monotonic()) > WATCH_S:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(WATCH_S)
        watch()
    return process.wait(max(left, 0))


def last_lines(log: Path) -> str:
    """The end of what a program said, as an error shows it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    return "its last lines:\n" + "\n".join(f"         {line[:200]}" for line in lines) if lines else "it said nothing"
