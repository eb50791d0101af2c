"""Runs an engine that TVM compiled. Stands alone: Python 3.8, numpy, and two libraries of TVM's, spoken to in C.

Neither the compiler nor any package of TVM's is needed: libtvm_ffi.so and libtvm_runtime.so are looked for in the
engine's folder, beside this file, and in installed packages. What is called is the C interface that
tvm/ffi/c_api.h and dlpack.h declare, whose layout does not change between releases. An engine for a GPU needs a third
one, libtvm_runtime_cuda.so, and with it NVIDIA's driver and CUDA's runtime.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import importlib.util
import json
import os
import platform
import time
from typing import Any

import numpy as np

# By the installed package that has it, below its folder.
_LIBRARIES = (("tvm_ffi", "lib", "libtvm_ffi.so"), ("tvm", "lib", "libtvm_runtime.so"))
_CUDA_HALF = ("tvm", "lib", "libtvm_runtime_cuda.so")
DRIVER, CUDART = "libcuda.so.1", "libcudart.so.13"  # what that one is linked against
_CUDART_PLACES = ("/usr/local/cuda*/lib64/", "/usr/local/cuda*/targets/*/lib/")
_CPU, _GPU, _FIRST, _POOLED = 1, 2, 0, 2  # device types, its number, and how the virtual machine allocates
_ALIGNMENT = 64  # kernels use aligned vector loads: on other addresses they crash
_INT, _STRING, _TENSOR = 1, 8, 70  # of TVMFFITypeIndex
_FLOAT32 = (2, 32, 1)  # DLDataType: kDLFloat, bits, lanes
_HEADER_BYTES = 24  # TVMFFIObject: what every object begins with
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: of the compute capability
_TIMED = 20  # inferences whose parts are timed once, at the start


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

    def __init__(self, folder: str, gpu: bool) -> None:
        self._ffi, _ = (ctypes.CDLL(_path(folder, *library), ctypes.RTLD_GLOBAL) for library in _LIBRARIES)
        if gpu:
            self._cuda_half = ctypes.CDLL(_path(folder, *_CUDA_HALF))
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
    if settings["gpu"] and (unfit := unfit_gpu(settings["gpu"])):
        raise EngineError(unfit)
    path = os.path.join(folder, "model.so")
    with open(path, "rb") as file:
        if hashlib.sha256(file.read()).hexdigest() != settings["sha256"]:
            raise EngineError(f"{path} is damaged: it is not the file that was compiled")
    return path


def gpu_here() -> tuple[str, str]:
    """The compute capability of the first GPU, as nvcc calls it (sm_87), and its name.

    Raises EngineError without an NVIDIA driver, or when it knows no GPU.
    """
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        raise EngineError(f"there is no NVIDIA driver here ({error})") from error
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), _FIRST):
        raise EngineError("the NVIDIA driver here knows no GPU: see what nvidia-smi says")
    driver.cuDeviceGetName(name, len(name), device)
    numbers = ctypes.c_int(), ctypes.c_int()
    for number, attribute in zip(numbers, (_MAJOR, _MINOR)):
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    return "sm_{}{}".format(*(number.value for number in numbers)), name.value.decode("utf-8", "replace")


def unfit_gpu(gpu: str) -> str:
    """Why this machine does not run engines for a GPU; empty when it does. Machine code fits one compute capability."""
    try:
        here, name = gpu_here()
    except EngineError as error:
        return f"this engine is for an NVIDIA GPU, {gpu}, and {error}"
    return "" if here == gpu else f"this engine is for {gpu}, and the GPU here is {here} ({name}): compile it for that"


class _Gpu:
    """Memory of the first GPU, by CUDA's runtime. Addresses are plain integers."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("nvidia")  # where pip puts CUDA
        packages = (found.submodule_search_locations or ()) if found else ()
        places = ["", *(os.path.join(place, f"cu{CUDART[-2:]}", "lib") for place in packages)]
        places += [place for pattern in _CUDART_PLACES for place in sorted(glob.glob(pattern), reverse=True)]
        for place in places:
            try:  # once it is loaded, TVM finds it by its name
                self._library = ctypes.CDLL(os.path.join(place, CUDART))
                return
            except OSError:
                continue
        raise EngineError(
            f"there is no {CUDART} here: install the runtime of CUDA {CUDART[-2:]}, which TVM needs on a GPU"
        )

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            describe = self._library.cudaGetErrorString
            describe.restype = ctypes.c_char_p
            raise EngineError(f"{name}: {describe(status).decode()} (error {status})")

    def allocate(self, size: int) -> int:
        """Memory there, in bytes."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value or 0

    def free(self, address: int) -> None:
        """Give it back."""
        self._call("cudaFree", ctypes.c_void_p(address))

    def copy(self, target: int, source: int, size: int, kind: int) -> None:
        """Copy bytes, and wait until they are there."""
        self._call("cudaMemcpy", ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size), kind)

    def wait(self) -> None:
        """Until all kernels are done. Raises EngineError when one has failed."""
        self._call("cudaDeviceSynchronize")


class _Feed:
    """Memory that kernels can read, of one shape, and the call that computes its logits. Made once: it costs time.

    On a GPU there is memory on both sides, and the images and logits are copied.
    """

    def __init__(self, runtime: _Runtime, function: ctypes.c_void_p, shape: tuple[int, ...], gpu: _Gpu | None) -> None:
        size = int(np.prod(shape)) * 4
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        self.images = memory[start : start + size].view(np.float32).reshape(shape)
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._gpu, self._address = gpu, gpu.allocate(size) if gpu else self.images.ctypes.data
        where = (_GPU if gpu else _CPU), _FIRST
        self._tensor = _Tensor(self._address, *where, len(shape), *_FLOAT32, self._shape)
        self._value, self._result, self._runtime = runtime.tensor(self._tensor), _Any(), runtime
        self._call = function, (_Any * 1)(self._value), 1, ctypes.byref(self._result)
        logits = runtime.called(self._call, self._result)
        tensor = _Tensor.from_address(logits + _HEADER_BYTES)
        self._logits_shape, self._offset = tensor.shape[: tensor.ndim], tensor.byte_offset
        self._floats = ctypes.c_float * int(np.prod(self._logits_shape))
        runtime.release(logits)

    def logits(self) -> np.ndarray:
        """Of the images that are in the memory now, copied: the virtual machine will use its memory again."""
        self.copy_in()
        found = self.compute()
        logits = self.copy_out(found)
        self._runtime.release(found)
        return logits

    def copy_in(self) -> None:
        """Bring the images to where kernels read them."""
        if self._gpu:
            self._gpu.copy(self._address, self.images.ctypes.data, self.images.nbytes, _TO_DEVICE)

    def compute(self) -> int:
        """The address of the tensor of logits, which are there when the GPU is done: the caller's to release."""
        return self._runtime.called(self._call, self._result)

    def copy_out(self, found: int) -> np.ndarray:
        """The logits of such a tensor."""
        data = _Tensor.from_address(found + _HEADER_BYTES).data + self._offset
        if self._gpu:
            logits = np.empty(self._logits_shape, np.float32)
            self._gpu.wait()
            self._gpu.copy(logits.ctypes.data, data, logits.nbytes, _TO_HOST)
            return logits
        content = self._floats.from_address(data)  # type: Any
        return np.frombuffer(content, np.float32).reshape(self._logits_shape).copy()  # type: ignore[no-any-return]

    def parts_ms(self, gpu: _Gpu) -> dict[str, float]:
        """Median milliseconds of the copy in, the kernels and the copy out, with the host waiting for each."""
        rows = []
        for _ in range(_TIMED):
            moments = [time.perf_counter()]
            self.copy_in()
            moments.append(time.perf_counter())
            found = self.compute()
            gpu.wait()
            moments.append(time.perf_counter())
            self.copy_out(found)
            moments.append(time.perf_counter())
            self._runtime.release(found)
            rows.append(1e3 * np.diff(moments))
        return dict(zip(("copy_in", "compute", "copy_out"), np.median(rows, axis=0).tolist()))

    def close(self) -> None:
        """Give the memory back."""
        self._runtime.release(self._value.pointer)
        if self._gpu:
            self._gpu.free(self._address)


class Runner:
    """A loaded engine. `facts` says what really runs."""

    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        engine = _check(folder, settings)
        os.environ["TVM_NUM_THREADS"] = str(settings["threads"])
        # Or it would pin this thread, and with it whatever else runs in this process, to one core.
        os.environ["TVM_BIND_THREADS"] = "0"
        self._gpu = _Gpu() if settings["gpu"] else None
        self._runtime = runtime = _Runtime(folder, gpu=bool(settings["gpu"]))
        library = runtime.call(runtime.function("ffi.ModuleLoadFromFile"), _text(engine))
        machine = runtime.call(runtime.method(library, "vm_load_executable"))
        devices = [_GPU, _CPU] if self._gpu else [_CPU]  # the host computes shapes, and comes last
        given = [_integer(number) for device in devices for number in (device, _FIRST, _POOLED)]
        runtime.call(runtime.method(machine, "vm_initialization"), *given)
        self._main = runtime.method(machine, "main")
        self._feed = None  # type: _Feed | None
        self.facts = {
            "runtime": "tvm",
            "version": settings["version"],
            "providers": [settings["gpu"] or settings["cpu"]],
            "threads": settings["threads"],
        }  # type: dict[str, Any]
        if self._gpu:
            self.facts["device"] = gpu_here()[1]

    def run(self, x: np.ndarray) -> np.ndarray:
        """Logits float32 [B, K] of normalised images x float32 [B, C, H, W]."""
        feed = self._feed
        if feed is None or feed.images.shape != x.shape:
            if feed is not None:
                self._feed = None  # or it would stay, closed, where no other one can be made
                feed.close()
            feed = self._feed = _Feed(self._runtime, self._main, x.shape, self._gpu)
        feed.images[...] = x
        if self._gpu and "parts_ms" not in self.facts:
            self.facts["parts_ms"] = feed.parts_ms(self._gpu)
        return feed.logits()


def load(folder: str) -> Runner:
    """Open the engine in `folder`."""
    with open(os.path.join(folder, "engine.json")) as file:
        settings = json.load(file)
    return Runner(folder, settings)
