"""Engines to the device, the agent run there to its end, and what it measured back."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.artifact import sha256_of
from edgekd.backends import Engine
from edgekd.bench.end_to_end import Pictures
from edgekd.bench.measured import Measured
from edgekd.device import AGENT, Device, Finished, Job, files_below, free_some_space, last_lines
from edgekd.device.bootstrap import installed_url
from edgekd.documents import LIMIT_BYTES, fitting, parsed
from edgekd.errors import ConnectionLost, DiskFull, StageError

_log = logging.getLogger(__name__)
Progress = Callable[[float, float, str], None]  # share done, seconds left, stage

MAX_NPY_BYTES = 1 << 30
ATTEMPTS = 5  # to go on after an interruption
ARGV = ("-m", "agent", "bench", "spec.json", "--lifeline")


def measured_on(
    device: Device,
    engines: Mapping[str, Engine],
    samples: npt.NDArray[np.float32],
    settings: Mapping[str, Any],
    workdir: Path,
    *,
    pictures: Pictures | None,
    timeout: float,
    on_progress: Progress | None,
    attempts: int = ATTEMPTS,
) -> dict[str, Any]:
    """What the agent says of the benchmark that `settings` ask for; its arrays are in `workdir` then.

    timeout: seconds, for a device that hangs; attempts: 1 not to go on after an interruption. Raises StageError when an
    engine cannot be run there.
    """
    sent = bundle(engines, samples, settings, workdir, pictures)
    # Empty, in the place of one that an earlier run may have left there.
    (workdir / "result.json").write_bytes(b"")
    # Named by what is measured: a benchmark that a killed host left on the device is gone on with.
    name = sha256_of(workdir / "spec.json")[:16]
    with device.reserved(lambda text: on_progress and on_progress(0.0, 0.0, text)), device.job(name) as job:
        job.put(sent)
        job.put({"result.json": workdir / "result.json"}, changes=True)
        argv = [job.python, *ARGV]
        _measure(job, argv, timeout, on_progress, attempts, backend=next(iter(engines.values())).backend)
        kinds = ("latency", "logits", *(["end_to_end"] if pictures else []))
        return _fetch(job, engines, kinds, workdir) | {"argv": argv}


def bundle(
    engines: Mapping[str, Engine],
    samples: npt.NDArray[np.float32],
    settings: Mapping[str, Any],
    workdir: Path,
    pictures: Pictures | None,
) -> dict[str, Path]:
    """All that the device gets, by its name there. The spec among it holds the sha256 of all the rest."""
    np.save(workdir / "samples.npy", np.ascontiguousarray(samples, np.float32))
    sent = {"agent": AGENT, "samples.npy": workdir / "samples.npy"}
    for name, engine in engines.items():
        sent |= {name: engine.folder, f"{name}_runner.py": engine.runner}
        sent |= {library.name: library for library in engine.libraries}
    stored = pictures.write(workdir / "pictures") if pictures else None
    if stored:
        sent["pictures"] = workdir / "pictures"
    files = {name: sha256_of(file) for name, file in files_below(sent).items()}
    models = [{"name": name, "folder": name, "runner": f"{name}_runner.py"} for name in engines]
    spec = dict(settings, models=models, samples="samples.npy", pictures=stored, files=files)
    (workdir / "spec.json").write_text(json.dumps(spec, indent=2), encoding="utf-8")
    return sent | {"spec.json": workdir / "spec.json"}


def _measure(
    job: Job, argv: list[str], timeout: float, on_progress: Progress | None, attempts: int, backend: str
) -> None:
    """Run the agent to its end. After a lost connection, a restart of the device or the agent's death it goes on with
    the launch that was interrupted."""
    for attempt in range(1, attempts + 1):
        try:
            finished = job.run(argv, timeout=timeout, on_stderr_line=_progress_line(on_progress))
        except ConnectionLost as error:
            if attempt == attempts:
                raise
            if _is_over(job):
                return
            _log.warning("%s; the benchmark goes on when it is back", error.what)
            continue
        if finished.status >= 0:
            break
        if attempt < attempts:
            _log.warning("%s: the agent was killed; the benchmark goes on", job.device.url)
    if finished.status:
        raise _failure(finished, job.device.url, attempts, backend)


def _is_over(job: Job) -> bool:
    """Whether the agent came to its end before the connection did."""
    with tempfile.TemporaryDirectory() as folder:
        job.get("result.json", Path(folder, "result.json"), limit_bytes=LIMIT_BYTES)
        return Path(folder, "result.json").stat().st_size > 0


def _fetch(job: Job, engines: Mapping[str, Engine], kinds: Iterable[str], workdir: Path) -> dict[str, Any]:
    job.get("result.json", workdir / "result.json", limit_bytes=LIMIT_BYTES)
    for name in engines:
        for file in (f"{name}_{kind}.npy" for kind in kinds):
            job.get(file, workdir / file, limit_bytes=MAX_NPY_BYTES)
    source = f"result.json of the agent on {job.device.url}"
    result = parsed((workdir / "result.json").read_text(encoding="utf-8", errors="replace"), source)
    if not isinstance(result.get("models"), dict) or set(result["models"]) != set(engines):
        raise StageError(
            f'benchmark on "{job.device.url}": its result is not of {" and ".join(engines)}',
            allowed="each is timed, and nothing else",
            fix="measure again: edgekd bench",
        )
    return fitting(result, Measured, source)


def _progress_line(on_progress: Progress | None) -> Callable[[str], None]:
    def on_line(line: str) -> None:
        report = _said(line, "progress")
        if not on_progress or not report:
            return
        try:
            told = float(report["progress"]), float(report["left_s"]), str(report["stage"])
        except (LookupError, TypeError, ValueError):  # not the agent's after all
            return
        on_progress(*told)

    return on_line


def _said(line: str, key: str) -> dict[str, Any] | None:
    """The agent's own line about `key`, among all that a runtime may print."""
    if not line.startswith(f'{{"{key}"'):
        return None
    try:
        return parsed(line, "a line of the agent")
    except StageError:
        return None


def _failure(finished: Finished, url: str, attempts: int, backend: str) -> StageError:
    lines = [line for line in finished.stderr_tail if not _said(line, "progress")]
    what, fix, said = "the agent ended without a result", "see whether the engine runs there by itself", ""
    if finished.status < 0:
        times = f" {attempts} times" if attempts > 1 else ""
        what = f"the agent was killed{times} (signal {signal.Signals(-finished.status).name})"
        fix = "see whether the memory there is enough: sudo dmesg | tail"
    elif lines and (last := _said(lines[-1], "error")):
        what = str(last["error"])
        lines.pop()
    if "numpy is not installed" in what or "No module named" in what:
        install = [] if url.startswith("local:") else ["--install"]  # there it says which command of pip
        fix = shlex.join(["edgekd", "doctor", "--device", url, "--backend", backend, *install])
        if (made := installed_url(url)) != url and install:
            fix += f", and then: --device {shlex.quote(made)}"
    elif "disk is full" in what:
        said = last_lines(lines) if lines else ""
        return DiskFull(f'benchmark on "{url}": {what}', allowed=said, fix=free_some_space(url))
    elif "clocks cannot be locked" in what:
        fix = "leave out --lock-clocks, or run it as root there, on a kernel that lets clocks be set"
    elif "this engine is for" in what:
        said = "an engine runs on the kind of processor, or of GPU, that it is compiled for"
        fix = "compile it for that machine: another --target, or other options of the backend: edgekd list backends"
    elif "sha256" in what:
        fix = "send it again: edgekd bench"
    return StageError(f'benchmark on "{url}": {what}', allowed=said or (last_lines(lines) if lines else ""), fix=fix)
