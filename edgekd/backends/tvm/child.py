"""The compiler's process: what crashes or hangs in there is an error here, with its last lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import StageError

LAST_LINES = 8


def run(job: Mapping[str, Any], timeout: float, log: Path | None = None) -> dict[str, Any]:
    """What `edgekd.backends.tvm.compiler` makes of a job.

    All that it prints goes to `log`. Raises StageError when it crashes or takes longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        asked, result = Path(folder, "job.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(dict(job)), encoding="utf-8")
        said = log or Path(folder, "tvm.log")
        argv = [sys.executable, "-m", "edgekd.backends.tvm.compiler", str(asked), str(result)]
        how = ended(argv, said, timeout)
        if how or not result.is_file():
            raise StageError(
                f"tvm's compiler {how or 'ended without a result'} on {job['onnx']}",
                allowed=f"{last_lines(said)}" + (f"\n       all of them: {log}" if log else ""),
                fix="export the model in another form, give it more time (option timeout), or use another backend",
            )
        content: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return content


def ended(argv: list[str], log: Path, timeout: float) -> str:
    """Run a program with its output in `log`; how it ended when that was not by itself with status 0."""
    # TVM pins its threads to cores unless told not to.
    environment = {**os.environ, "TVM_BIND_THREADS": "0", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"did not end within {timeout:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status < 0:
        return f"crashed ({signal.Signals(-status).name})"
    return f"ended with exit status {status}" if status else ""


def last_lines(log: Path) -> str:
    """The end of what a program said, as an error shows it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    return "its last lines:\n" + "\n".join(f"         {line[:200]}" for line in lines) if lines else "it said nothing"
