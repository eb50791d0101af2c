"""Runs an engine that TVM compiled. Stands alone: Python 3.8, numpy, tvm_ffi and the library libtvm_runtime.so.

The compiler is not needed: the library is looked for in the engine's folder, beside this file, and in an installed tvm.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import sys
from typing import Any

import numpy as np

# tvm_ffi imports torch where it is installed: seconds and hundreds of megabytes for nothing that is needed here.
_without_torch = "torch" not in sys.modules
if _without_torch:
    sys.modules["torch"] = None  # type: ignore[assignment]
import tvm_ffi  # noqa: E402

if _without_torch:
    del sys.modules["torch"]

_LIBRARY = "libtvm_runtime.so"
_CPU, _FIRST, _POOLED = 1, 0, 2  # the device type, its number, and how the virtual machine allocates
_ALIGNMENT = 64  # kernels use aligned vector loads: on other addresses they crash


class EngineError(RuntimeError):
    """The engine is damaged, or made for another machine."""


def _library(folder: str) -> str:
    """Where libtvm_runtime.so is."""
    places = [folder, os.path.dirname(os.path.abspath(__file__))]
    found = importlib.util.find_spec("tvm")
    for package in (found.submodule_search_locations or ()) if found else ():
        places += [os.path.join(package, "lib"), package]
    for place in places:
        if os.path.exists(os.path.join(place, _LIBRARY)):
            return os.path.join(place, _LIBRARY)
    raise EngineError(f"there is no {_LIBRARY} in {', '.join(places)}: put it there, or pip install apache-tvm")


def _instruction_sets() -> set[str]:
    """What the processor has, as Linux calls it, without underscores; nothing where it does not say."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line.partition(":")[2] for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return set()
    return {name.replace("_", "") for name in lines[0].split()} if lines else set()


def _check(folder: str, settings: dict[str, Any]) -> str:
    """The engine's path. Raises EngineError when it would crash here."""
    if settings["arch"] != platform.machine():
        raise EngineError(f"this engine is for {settings['arch']}, this machine is {platform.machine()}")
    has = _instruction_sets()
    missing = [name for name in settings["needs"] if has and name not in has]
    if missing:
        raise EngineError(f"this engine is for {settings['cpu']}, this processor has no {', '.join(missing)}")
    path = os.path.join(folder, "model.so")
    with open(path, "rb") as file:
        if hashlib.sha256(file.read()).hexdigest() != settings["sha256"]:
            raise EngineError(f"{path} is damaged: it is not the file that was compiled")
    return path


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array that kernels can read."""
    size = int(np.prod(shape)) * 4
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(np.float32).reshape(shape)


class Runner:
    """A loaded engine. `facts` says what really runs."""

    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        engine = _check(folder, settings)
        os.environ["TVM_NUM_THREADS"] = str(settings["threads"])
        # Or it would pin this thread, and with it whatever else runs in this process, to one core.
        os.environ["TVM_BIND_THREADS"] = "0"
        ctypes.CDLL(_library(folder), ctypes.RTLD_GLOBAL)
        self._machine = tvm_ffi.load_module(engine)["vm_load_executable"]()
        self._machine["vm_initialization"](_CPU, _FIRST, _POOLED)
        self._main = self._machine["main"]
        self._input = _aligned((0,))
        self._tensor = None  # type: Any
        self.facts = {
            "runtime": "tvm",
            "version": settings["version"],
            "providers": [settings["cpu"]],
            "threads": settings["threads"],
        }

    def run(self, x: np.ndarray) -> np.ndarray:
        """Logits float32 [B, K] of normalised images x float32 [B, C, H, W]."""
        if x.shape != self._input.shape:
            self._input = _aligned(x.shape)
            self._tensor = tvm_ffi.from_dlpack(self._input, require_alignment=_ALIGNMENT)
        self._input[...] = x
        logits = np.from_dlpack(self._main(self._tensor)).copy()  # type: np.ndarray
        return logits


def load(folder: str) -> Runner:
    """Open the engine in `folder`."""
    with open(os.path.join(folder, "engine.json")) as file:
        settings = json.load(file)
    return Runner(folder, settings)
