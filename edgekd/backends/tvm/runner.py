"""Runs an engine that TVM compiled. Stands alone: Python 3.8, numpy, and two libraries of TVM's, spoken to in C.

Neither the compiler nor any package of TVM's is needed: libtvm_ffi.so and libtvm_runtime.so are looked for in the
engine's folder, beside this file, and in installed packages. What is called is the C interface that
tvm/ffi/c_api.h and dlpack.h declare, whose layout does not change between releases.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
from typing import Any

import numpy as np

# By the installed package that has it, below its folder.
_LIBRARIES = (("tvm_ffi", "lib", "libtvm_ffi.so"), ("tvm", "lib", "libtvm_runtime.so"))
_CPU, _FIRST, _POOLED = 1, 0, 2  # the device type, its number, and how the virtual machine allocates
_ALIGNMENT = 64  # kernels use aligned vector loads: on other addresses they crash
_INT, _STRING, _TENSOR = 1, 8, 70  # of TVMFFITypeIndex
_FLOAT32 = (2, 32, 1)  # DLDataType: kDLFloat, bits, lanes
_HEADER_BYTES = 24  # TVMFFIObject: what every object begins with


class EngineError(RuntimeError):
    """The engine is damaged, made for another machine, or failed."""


class _Content(ctypes.Union):
    _fields_ = (("integer", ctypes.c_int64), ("pointer", ctypes.c_void_p), ("text", ctypes.c_char_p))


class _Any(ctypes.Structure):
    """TVMFFIAny: a value with its type."""

    _anonymous_ = ("content",)
    _fields_ = (("kind", ctypes.c_int32), ("padding", ctypes.c_uint32), ("content", _Content))


class _Bytes(ctypes.Structure):
    """TVMFFIByteArray."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Tensor(ctypes.Structure):
    """DLManagedTensor: a DLTensor and who frees it, which is nobody here."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


def _path(folder: str, package: str, below: str, name: str) -> str:
    """Where a library is."""
    places = [folder, os.path.dirname(os.path.abspath(__file__))]
    found = importlib.util.find_spec(package)
    places += [os.path.join(place, below) for place in (found.submodule_search_locations or ())] if found else []
    for place in places:
        if os.path.exists(os.path.join(place, name)):
            return os.path.join(place, name)
    raise EngineError(f"there is no {name} in {', '.join(places)}: put it there, or pip install apache-tvm")


class _Runtime:
    """TVM's runtime in this process."""

    def __init__(self, folder: str) -> None:
        self._ffi, _ = (ctypes.CDLL(_path(folder, *library), ctypes.RTLD_GLOBAL) for library in _LIBRARIES)
        self._function_call, self.release = self._ffi.TVMFFIFunctionCall, self._ffi.TVMFFIObjectDecRef
        self.release.argtypes = (ctypes.c_void_p,)

    def function(self, name: str) -> ctypes.c_void_p:
        """A global function."""
        text, found = ctypes.create_string_buffer(name.encode()), ctypes.c_void_p()
        asked = _Bytes(ctypes.addressof(text), len(name))
        self._checked(self._ffi.TVMFFIFunctionGetGlobal(ctypes.byref(asked), ctypes.byref(found)))
        return found

    def method(self, module: _Any, name: str) -> ctypes.c_void_p:
        """A function of a module."""
        found = self.call(self.function("ffi.ModuleGetFunction"), module, _text(name), _integer(0))
        if not found.pointer:
            raise EngineError(f"the engine has no function {name}")
        return ctypes.c_void_p(found.pointer)

    def call(self, function: ctypes.c_void_p, *arguments: _Any) -> _Any:
        """What a function returns."""
        result = _Any()
        self.called((function, (_Any * len(arguments))(*arguments), len(arguments), ctypes.byref(result)), result)
        return result

    def called(self, call: tuple[Any, ...], result: _Any) -> int:
        """The address of the object that a call has put into its result: the caller's to release."""
        result.kind = 0  # or it would be taken for something that the call must not overwrite
        if status := self._function_call(*call):
            self._checked(status)
        return result.pointer or 0

    def tensor(self, tensor: _Tensor) -> _Any:
        """A tensor over memory that must stay."""
        found = ctypes.c_void_p()
        self._checked(self._ffi.TVMFFITensorFromDLPack(ctypes.byref(tensor), _ALIGNMENT, 1, ctypes.byref(found)))
        return _Any(_TENSOR, 0, _Content(pointer=found.value))

    def _checked(self, status: int) -> None:
        if status == 0:
            return
        error = ctypes.c_void_p()
        self._ffi.TVMFFIErrorMoveFromRaised(ctypes.byref(error))
        if not error.value:
            raise EngineError(f"TVM's runtime failed with status {status}")
        kind, message = (_Bytes * 2).from_address(error.value + _HEADER_BYTES)
        said = [ctypes.string_at(part.data, part.size).decode("utf-8", "replace") for part in (kind, message)]
        self._ffi.TVMFFIObjectDecRef(error)
        raise EngineError(": ".join(said))


def _integer(value: int) -> _Any:
    return _Any(_INT, 0, _Content(integer=value))


def _text(value: str) -> _Any:
    return _Any(_STRING, 0, _Content(text=value.encode()))


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


class _Feed:
    """Memory that kernels can read, of one shape, and the call that computes its logits. Made once: it costs time."""

    def __init__(self, runtime: _Runtime, function: ctypes.c_void_p, shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape)) * 4
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        self.images = memory[start : start + size].view(np.float32).reshape(shape)
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._tensor = _Tensor(self.images.ctypes.data, _CPU, _FIRST, len(shape), *_FLOAT32, self._shape)
        self._value, self._result, self._runtime = runtime.tensor(self._tensor), _Any(), runtime
        self._call = function, (_Any * 1)(self._value), 1, ctypes.byref(self._result)
        logits = runtime.called(self._call, self._result)
        tensor = _Tensor.from_address(logits + _HEADER_BYTES)
        self._logits_shape, self._offset = tensor.shape[: tensor.ndim], tensor.byte_offset
        self._floats = ctypes.c_float * int(np.prod(self._logits_shape))
        runtime.release(logits)

    def logits(self) -> np.ndarray:
        """Of the images that are in the memory now, copied: the virtual machine will use its memory again."""
        found = self._runtime.called(self._call, self._result)
        data = _Tensor.from_address(found + _HEADER_BYTES).data + self._offset
        content = self._floats.from_address(data)  # type: Any
        logits = np.frombuffer(content, np.float32).reshape(self._logits_shape).copy()
        self._runtime.release(found)
        return logits  # type: ignore[no-any-return]

    def close(self) -> None:
        """Give the memory back."""
        self._runtime.release(self._value.pointer)


class Runner:
    """A loaded engine. `facts` says what really runs."""

    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        engine = _check(folder, settings)
        os.environ["TVM_NUM_THREADS"] = str(settings["threads"])
        # Or it would pin this thread, and with it whatever else runs in this process, to one core.
        os.environ["TVM_BIND_THREADS"] = "0"
        self._runtime = runtime = _Runtime(folder)
        library = runtime.call(runtime.function("ffi.ModuleLoadFromFile"), _text(engine))
        machine = runtime.call(runtime.method(library, "vm_load_executable"))
        runtime.call(runtime.method(machine, "vm_initialization"), *map(_integer, (_CPU, _FIRST, _POOLED)))
        self._main = runtime.method(machine, "main")
        self._feed = None  # type: _Feed | None
        self.facts = {
            "runtime": "tvm",
            "version": settings["version"],
            "providers": [settings["cpu"]],
            "threads": settings["threads"],
        }

    def run(self, x: np.ndarray) -> np.ndarray:
        """Logits float32 [B, K] of normalised images x float32 [B, C, H, W]."""
        feed = self._feed
        if feed is None or feed.images.shape != x.shape:
            if feed is not None:
                feed.close()
            feed = self._feed = _Feed(self._runtime, self._main, x.shape)
        feed.images[...] = x
        return feed.logits()


def load(folder: str) -> Runner:
    """Open the engine in `folder`."""
    with open(os.path.join(folder, "engine.json")) as file:
        settings = json.load(file)
    return Runner(folder, settings)
