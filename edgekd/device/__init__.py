"""A machine to run things on: this one, or a board, behind one class. The URL's scheme chooses the transport.

device = Device("local:", workdir)
with device.job() as job:
    job.put(folder, "student")
    job.run([job.python, "-m", "agent", "bench", "spec.json"], timeout=60)
    job.get("result.json", path)
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import edgekd
from edgekd import registry
from edgekd.device.process import Finished, last_lines, run
from edgekd.errors import StageError

__all__ = ["AGENT", "JSON_LIMIT_BYTES", "Device", "Finished", "Job", "Transport", "last_lines", "parsed"]

AGENT = Path(edgekd.__file__).with_name("agent")
FACTS_TIMEOUT_S = 60.0
# The agent's documents are a few hundred kilobytes; what is larger did not come from the agent.
JSON_LIMIT_BYTES = 16 << 20


class Transport(ABC):
    """How to reach a machine. Registered by its URL scheme as `@register("transport", SCHEME)`; made from the URL.

    Paths on the device are strings in its own notation; `folder` is one that `make_folder` returned, `name` is a
    relative path below it.
    """

    # The Python interpreter on the device.
    python: str

    @abstractmethod
    def make_folder(self) -> str:
        """Make a fresh, empty folder on the device, private to us; return its path."""

    @abstractmethod
    def remove_folder(self, folder: str) -> None:
        """Delete the folder and everything in it."""

    @abstractmethod
    def put(self, source: Path, folder: str, name: str) -> None:
        """Copy a file, or a folder with everything in it, to the device."""

    @abstractmethod
    def get(self, folder: str, name: str, target: Path, limit_bytes: int) -> None:
        """Copy one file from the device. Raises StageError when it is absent or larger than the limit."""

    @abstractmethod
    def command(self, argv: Sequence[str], folder: str) -> tuple[list[str], Path | None]:
        """The command on this machine, and where to run it, that runs `argv` in `folder` on the device.

        It must hand standard input, output and error through, and close the remote standard input when it is killed.
        """


class Device:
    """A machine, by URL.

    Raises RecipeError when no transport has the URL's scheme.
    """

    def __init__(self, url: str, workdir: Path, options: Mapping[str, Any] | None = None) -> None:
        self.url = url
        scheme = url.partition(":")[0]
        self.transport: Transport = registry.create(
            "transport", scheme, url, workdir, options=options, where=f"the scheme of device {url!r}"
        )

    @contextmanager
    def job(self) -> Iterator[Job]:
        """A fresh folder on the device, deleted at the end."""
        folder = self.transport.make_folder()
        try:
            yield Job(self, folder)
        finally:
            self.transport.remove_folder(folder)

    def facts(self) -> dict[str, Any]:
        """What machine it is and how it is doing now, found out by the agent on the machine itself."""
        with self.job() as job:
            job.put(AGENT, "agent")
            finished = job.run([job.python, "-m", "agent", "facts"], timeout=FACTS_TIMEOUT_S)
        finished.check(f"the agent on {self.url}")
        return parsed(finished.stdout, f"the facts of {self.url}")


class Job:
    """A folder on a device, and what is run in it."""

    def __init__(self, device: Device, folder: str) -> None:
        self.device, self.folder = device, folder
        self.python = device.transport.python

    def put(self, source: Path, name: str) -> None:
        """Copy a file or folder to `name`, relative to the job's folder."""
        self.device.transport.put(source, self.folder, _inside(name))

    def get(self, name: str, target: Path, *, limit_bytes: int) -> None:
        """Copy the file `name` to `target`. Raises StageError when it is absent or larger than the limit."""
        self.device.transport.get(self.folder, _inside(name), target, limit_bytes)

    def run(
        self, argv: Sequence[str], *, timeout: float, on_stderr_line: Callable[[str], None] | None = None
    ) -> Finished:
        """Run a command in the job's folder and wait for it.

        It and its children are ended when the time is over, on Ctrl-C and on any error here. Its standard input stays
        open as long as we live. Raises StageError on time-out.
        """
        command, cwd = self.device.transport.command(argv, self.folder)
        return run(command, cwd=cwd, timeout=timeout, on_stderr_line=on_stderr_line)


def _inside(name: str) -> str:
    """A relative path that stays in its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name!r} is not a path inside the job's folder")
    return str(path)


def parsed(text: str, source: str) -> dict[str, Any]:
    """The JSON object that the agent wrote. Raises StageError when it is too large, too deep or no JSON object."""
    try:
        if len(text) > JSON_LIMIT_BYTES:
            raise ValueError(f"{len(text)} characters, at most {JSON_LIMIT_BYTES} allowed")
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError(f"a JSON {type(document).__name__}, not an object")
        return document
    except (ValueError, RecursionError) as error:
        raise StageError(
            f"{source}: not what the agent writes: {error}",
            allowed="expected: a JSON object",
            fix="run it again with --debug",
        ) from error
