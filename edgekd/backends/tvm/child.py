"""TVM's compiler in a process of its own, and so whoever asks NVIDIA's driver."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekd.backends import child
from edgekd.backends.tvm import nvcc

# TVM pins its threads to cores unless told not to.
ENVIRONMENT = {"TVM_BIND_THREADS": "0", "OMP_NUM_THREADS": "1"}
# Where this very edgekd lies, and not what a user's folder may have by that name.
PACKAGES = Path(__file__).parents[3]
ASK_DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from edgekd.backends.tvm.runner import unfit_gpu
sys.exit(bool(unfit_gpu(sys.argv[2])))
"""
DRIVER_TIMEOUT_S = 60.0


def run(
    job: Mapping[str, Any], timeout: float, log: Path | None = None, watch: Callable[[], None] | None = None
) -> dict[str, Any]:
    """What `edgekd.backends.tvm.compiler` makes of a job.

    All that it prints goes to `log`; `watch` is called again and again meanwhile. Raises StageError when it crashes or
    takes longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        asked, result = Path(folder, "job.json"), Path(folder, "result.json")
        asked.write_text(json.dumps(dict(job)), encoding="utf-8")
        return child.result_of(
            [sys.executable, "-m", "edgekd.backends.tvm.compiler", str(asked), str(result)],
            result,
            what=f"tvm, compiling {job['onnx']}",
            fix="export the model in another form, give it more time (option timeout), or use another backend",
            timeout=timeout,
            log=log,
            environment=ENVIRONMENT | (nvcc.environment(Path(folder)) if job["gpu"] else {}),
            watch=watch,
        )


@functools.cache
def has_gpu(gpu: str) -> bool:
    """Whether this machine runs engines for a GPU. A process that has asked the driver could not be forked any more."""
    argv = [sys.executable, "-P", "-c", ASK_DRIVER, str(PACKAGES), gpu]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=DRIVER_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
