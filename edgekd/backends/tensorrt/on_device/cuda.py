"""The few calls of CUDA's runtime that inference needs, by ctypes: a board with TensorRT has the library already."""

from __future__ import annotations

import ctypes
import ctypes.util
import glob
from typing import Any

TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
# cudaDeviceAttr
_MAJOR, _MINOR, _MULTIPROCESSORS = 75, 76, 16
_CAPTURE_THREAD_LOCAL = 1  # cudaStreamCaptureMode: other threads of the process may call CUDA meanwhile
_PROPERTIES_BYTES = 1 << 14  # more than cudaDeviceProp has in any version; its first 256 bytes are the name
_PLACES = ("/usr/local/cuda*/lib64/libcudart.so*", "/usr/local/cuda*/targets/*/lib/libcudart.so*")


class CudaError(RuntimeError):
    """CUDA refused a call, or is not here."""


class Cuda:
    """Device 0. Addresses, streams and events are plain integers."""

    def __init__(self) -> None:
        self._library = _library()
        self._call("cudaSetDevice", 0)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            describe = self._library.cudaGetErrorString
            describe.restype = ctypes.c_char_p
            raise CudaError(f"{name}: {describe(status).decode()} (error {status})")

    def _made(self, name: str, *arguments: Any) -> int:
        """What a call writes through its first argument."""
        made = ctypes.c_void_p()
        self._call(name, ctypes.byref(made), *arguments)
        return made.value or 0

    def facts(self) -> dict[str, Any]:
        """Name, compute capability and number of multiprocessors of the chip."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._call("cudaGetDeviceProperties", properties, 0)
        return {
            "device": properties.value.decode("utf-8", "replace"),
            "compute_capability": f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}",
            "multiprocessors": self._attribute(_MULTIPROCESSORS),
        }

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), number, 0)
        return value.value

    def allocate(self, size: int) -> int:
        """Memory on the device, in bytes; kept until the process ends."""
        return self._made("cudaMalloc", ctypes.c_size_t(size))

    def stream(self) -> int:
        """A new stream."""
        return self._made("cudaStreamCreate")

    def copy(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        """Copy bytes, after what the stream holds."""
        addresses = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._call("cudaMemcpyAsync", *addresses, ctypes.c_size_t(size), kind, ctypes.c_void_p(stream))

    def wait(self, stream: int) -> None:
        """Until all that the stream holds is done."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def event(self) -> int:
        """A new event."""
        return self._made("cudaEventCreate")

    def record(self, event: int, stream: int) -> None:
        """Let the event happen after what the stream holds."""
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def between_ms(self, first: int, second: int) -> float:
        """Milliseconds from one event to another; both must have happened."""
        value = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(value), ctypes.c_void_p(first), ctypes.c_void_p(second))
        return value.value

    def begin_capture(self, stream: int) -> None:
        """What is put on the stream from now on is written down, not done."""
        self._call("cudaStreamBeginCapture", ctypes.c_void_p(stream), _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """What was written down, ready to be launched."""
        graph = ctypes.c_void_p()
        self._call("cudaStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        return self._made("cudaGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))

    def launch(self, graph: int, stream: int) -> None:
        """Put all of it on the stream again, in one call."""
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))


def _library() -> ctypes.CDLL:
    found = [name for name in ("libcudart.so", ctypes.util.find_library("cudart")) if name]
    tried = found + [path for place in _PLACES for path in sorted(glob.glob(place), reverse=True)]
    for name in tried:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError("libcudart is not here; it is a part of JetPack: sudo apt install nvidia-jetpack")
