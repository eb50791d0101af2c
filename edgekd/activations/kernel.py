"""The CPU kernel of LMA: `segments.c`, compiled by the system's C compiler at first use and kept in the user's cache.

Everything works without it: `load` gives None where there is no compiler, and the callers then use plain torch.
The kernel is worth having because plain torch makes one pass over the tensor for every segment, forward and backward.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("segments.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")


class Kernel:
    """The compiled functions for one number of segments.

    `x` and `grad` are dense, on the CPU and in one memory layout; half precision goes through float32. Cuts, slopes and
    biases are float32.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def statistics(self, x: Tensor) -> Tensor:
        """Mean and unbiased standard deviation over all of `x`, as a tensor [2]."""
        mean_std = torch.empty(2)
        self._call("statistics", (x.float(),), (mean_std,))
        return mean_std

    def forward(self, x: Tensor, cuts: Tensor, slopes: Tensor, biases: Tensor) -> Tensor:
        """`slopes[j] * x + biases[j]`, shaped and laid out like `x`."""
        y = torch.empty_like(x, dtype=torch.float32)
        self._call("forward", (x.float(), y), (cuts, slopes, biases))
        return y.to(x.dtype)

    def backward(self, x: Tensor, grad: Tensor, cuts: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients with respect to `x`, `slopes` [k] and `biases` [k]."""
        grad_x = torch.empty_like(x, dtype=torch.float32)
        grad_slopes, grad_biases = torch.empty_like(slopes), torch.empty_like(slopes)
        self._call("backward", (x.float(), grad.float(), grad_x), (cuts, slopes, grad_slopes, grad_biases))
        return grad_x.to(x.dtype), grad_slopes, grad_biases

    def _call(self, name: str, arrays: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> None:
        code = getattr(self._library, name)(
            *(ctypes.c_void_p(array.data_ptr()) for array in arrays),
            ctypes.c_int64(arrays[0].numel()),
            ctypes.c_int(torch.get_num_threads()),
            *(ctypes.c_void_p(table.data_ptr()) for table in tables),
        )
        if code:
            raise MemoryError(f"LMA kernel: no memory for the partial sums of {arrays[0].numel()} values")


@functools.cache
def load(k: int) -> Kernel | None:
    """The kernel for `k` segments, compiled if it is not in the cache; None where that is not possible."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    try:
        command = [*compiler, *_FLAGS, f"-DK={k}", str(_SOURCE), "-lm"]
        path = _cache() / f"segments-{_digest(command)}.so"
        if not path.exists():
            _compile(command, path)
        return Kernel(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.info("LMA trains with plain torch, slower than its C kernel, which could not be built: %s", reason)
        return None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekd" / "kernels"


def _digest(command: list[str]) -> str:
    """Everything that the binary depends on. The CPU too: a home directory may be shared between machines."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True, timeout=30).stdout
    cpuinfo = Path("/proc/cpuinfo")
    facts = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = sorted({fact for fact in facts if fact.lower().startswith(("flags", "features", "model name", "cpu part"))})
    words = [*command, platform.platform(), platform.machine(), *cpu]
    return hashlib.sha256(b"\0".join([_SOURCE.read_bytes(), version, *map(str.encode, words)])).hexdigest()[:32]


def _compile(command: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run([*command, "-o", str(built)], capture_output=True, check=True, timeout=120)
        built.replace(path)  # atomic: a second process never loads half a file
