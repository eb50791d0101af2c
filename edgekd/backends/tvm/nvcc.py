"""Kernels for NVIDIA GPUs, compiled where there is none: TVM's CUDA half is made to load, nvcc to write machine code.

Without a driver that half does not load, and TVM then leaves CUDA source in the engine, to be compiled on the device by
whoever has TVM and nvcc there. So the compiler's process gets libraries of the driver's names and functions, all of
which say that there is no device.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from edgekd.backends.tvm import libraries
from edgekd.backends.tvm.runner import CUDART, DRIVER
from edgekd.errors import MissingError

NO_DEVICE = 100  # cudaErrorNoDevice, and CUDA_ERROR_NO_DEVICE
# Machine code in place of PTX; sums and divisions as accurate as a CPU's, in place of nvcc's fast ones.
ENVIRONMENT = {"TVM_CUDA_COMPILE_MODE": "nvcc", "TVM_CUDA_NVCC_NO_FAST_MATH": "1"}


def missing() -> str:
    """Empty, or why nothing can be compiled for a GPU here: the command that mends it."""
    lacking = [tool for tool in ("nvcc", "g++", "nm") if shutil.which(tool) is None]
    if not lacking:
        return ""
    fix = "install CUDA's compiler, https://developer.nvidia.com/cuda-downloads, and put its bin folder into PATH"
    return f"{' and '.join(lacking)} not installed: {fix if 'nvcc' in lacking else 'sudo apt install g++ binutils'}"


def environment(folder: Path) -> dict[str, str]:
    """Variables of a process that compiles for a GPU; `folder` must stay as long as it runs.

    Raises MissingError when the libraries cannot be made.
    """
    listed = _said(["nm", "-D", "--undefined-only", str(libraries.installed(libraries.CUDA))])
    source = folder / "no_device.c"
    names = sorted(set(re.findall(r"\bcu(?:da)?[A-Z]\w*", listed)))
    source.write_text("\n".join(map(_function, names)), encoding="utf-8")
    for name in (DRIVER, CUDART):
        _said(["g++", "-xc", "-shared", "-fPIC", f"-Wl,-soname,{name},--default-symver", "-o", str(folder / name),
               str(source)])  # fmt: skip
    before = os.environ.get("LD_LIBRARY_PATH")
    return ENVIRONMENT | {"LD_LIBRARY_PATH": os.pathsep.join([str(folder), *([before] if before else [])])}


def _function(name: str) -> str:
    if name.startswith("cudaGetError"):
        return f'const char *{name}(void) {{ return "no device"; }}'
    return f"int {name}(void) {{ return {NO_DEVICE}; }}"


def _said(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingError(
            f"TVM's CUDA half cannot be made to load: {argv[0]} ended with exit status {done.returncode}",
            allowed=f"it said: {(done.stderr.strip().splitlines() or ['nothing'])[-1]}",
            fix="see whether g++ and binutils are complete: sudo apt install g++ binutils",
        )
    return done.stdout
