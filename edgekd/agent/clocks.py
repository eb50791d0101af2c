"""Clocks held at their highest for as long as a benchmark runs, and put back whatever happens.

    python -m agent restore '{"FILE": "VALUE", ...}'      # waits for the end of standard input, then writes the files

That process of its own holds the values to put back. It is told of the agent's end by the kernel, however that came.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import signal
import subprocess
import sys
from typing import Any

from .errors import AgentError
from .sensors import gpus, read


def wanted(root: str) -> dict[str, str]:
    """The files that hold the clocks of the CPU and the GPU, with what they must hold. The order matters: a lower limit
    above the upper one is refused."""
    files = {}
    for policy in sorted(glob.glob(os.path.join(root, "sys/devices/system/cpu/cpufreq/policy*"))):
        highest = read(os.path.join(policy, "cpuinfo_max_freq"))
        if "performance" in read(os.path.join(policy, "scaling_available_governors")).split():
            files[os.path.join(policy, "scaling_governor")] = "performance"
        files[os.path.join(policy, "scaling_max_freq")] = highest
        files[os.path.join(policy, "scaling_min_freq")] = highest
    for gpu in gpus(root):
        files[os.path.join(gpu, "min_freq")] = read(os.path.join(gpu, "max_freq"))
    return {file: value for file, value in files.items() if value}


class Locked:
    """The clocks are locked from here to the end of the process, or to `close`."""

    def __init__(self, root: str) -> None:
        files = wanted(root)
        if not files:
            raise AgentError("the clocks cannot be locked: the kernel of this machine has no files for them")
        before = {file: read(file) for file in reversed(list(files))}
        self._guard = subprocess.Popen(
            [sys.executable, "-m", __package__, "restore", json.dumps(before)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._guard.stdout is not None
        self._guard.stdout.readline()  # it stands ready
        try:
            for file, value in files.items():
                write(file, value)
        except OSError as error:
            self.close()
            who = "only root may" if isinstance(error, PermissionError) else str(error.strerror)
            raise AgentError(f"the clocks cannot be locked: {error.filename}: {who}") from None

    def close(self) -> None:
        """Put everything back."""
        assert self._guard.stdin is not None and self._guard.stdout is not None
        self._guard.stdin.close()
        self._guard.stdout.close()
        self._guard.wait()


def restore(before: dict[str, Any]) -> None:
    """Wait for the end of standard input, then write the values back."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")  # whoever ends all processes of the job's folder does not mean us
    os.write(1, b"ready\n")
    while os.read(0, 4096):
        pass
    for file, value in before.items():
        with contextlib.suppress(OSError):
            if value != read(file):
                write(file, value)


def write(file: str, value: str) -> None:
    """Write a kernel file, which takes its value in one piece."""
    handle = os.open(file, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(handle, value.encode())
    except OSError as error:
        error.filename = file
        raise
    finally:
        os.close(handle)
