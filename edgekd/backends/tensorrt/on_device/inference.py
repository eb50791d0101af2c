"""Runs an engine: execute_async_v3 of TensorRT 8.5 and later, memory by CUDA's runtime."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from .build import PLAN, build, module, settings_of
from .cuda import TO_DEVICE, TO_HOST, Cuda
from .identity import ENVIRONMENT, ensured, environment

TIMED = 20  # queries whose parts are timed once, at the start


class EngineError(RuntimeError):
    """The engine cannot be built or run here."""


class Runner:
    """An engine that fits this board, opened; built first where there is none. `facts` says what really runs."""

    def __init__(self, folder: str) -> None:
        settings = settings_of(folder)
        trt = _module(settings)
        here = environment(trt.__version__)
        built, why = ensured(folder, here, build)
        if why:
            print("built the engine: {}".format("; ".join(why)), file=sys.stderr)
        if built["refused"]:
            raise EngineError("TensorRT {} cannot build it: {}".format(trt.__version__, "; ".join(built["refused"])))
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))  # must outlive the engine
        with open(os.path.join(folder, PLAN), "rb") as file:
            self._engine = self._runtime.deserialize_cuda_engine(file.read())
        if self._engine is None:
            raise EngineError(f"TensorRT {trt.__version__} cannot open {PLAN}, which it built: is the GPU free?")
        self._context = self._engine.create_execution_context()
        if not hasattr(self._context, "execute_async_v3"):
            raise EngineError(f"TensorRT {trt.__version__} cannot run it from Python; from 8.5 on it can")
        self._open(trt, settings)
        self.facts = {
            "runtime": settings["module"],
            "version": trt.__version__,
            "providers": [here["device"] + (" (CUDA graph)" if settings["cuda_graph"] else "")],
            "threads": 1,
            "mode": built["mode"],
            "built": why,
            "build_seconds": built["seconds"],
            "identity": {name: here[name] for name in ENVIRONMENT},
            "parts_ms": self.parts(np.zeros((1 if self._batch == -1 else self._batch, *self._image), np.float32)),
        }  # type: dict[str, Any]

    def _open(self, trt: Any, settings: dict[str, Any]) -> None:
        """One input and one output, [B, C, H, W] and [B, K] or a map of that, and memory for the largest batch."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        if len(names) != 2 or len(inputs) != 1:
            raise EngineError("the engine has the tensors {}, not one input and one output".format(", ".join(names)))
        self._input, self._output = inputs[0], next(name for name in names if name != inputs[0])
        shape = tuple(self._engine.get_tensor_shape(self._input))
        self._image, self._answer = shape[1:], tuple(self._engine.get_tensor_shape(self._output))[1:]
        if -1 in self._image + self._answer:
            raise EngineError(f"the engine leaves open what it takes or answers: {self._image} to {self._answer}")
        self._batch = shape[0]  # -1: any up to the largest
        self._most = settings["max_batch"] if self._batch == -1 else self._batch
        self._cuda = Cuda()
        self._stream = self._cuda.stream()
        self._events = [self._cuda.event() for _ in range(4)]
        self._on_device = {
            self._input: self._cuda.allocate(4 * self._most * int(np.prod(self._image))),
            self._output: self._cuda.allocate(4 * self._most * int(np.prod(self._answer))),
        }
        for name, address in self._on_device.items():
            self._context.set_tensor_address(name, address)
        self._graphs = {} if settings["cuda_graph"] else None  # type: dict[int, int] | None  # by batch size

    def run(self, x: np.ndarray) -> np.ndarray:
        """Logits float32 [B, K], or [B, K, H, W] of maps, for normalised images x float32 [B, C, H, W]."""
        if len(x) > self._most:
            return np.concatenate([self.run(x[at : at + self._most]) for at in range(0, len(x), self._most)])
        logits = np.empty((len(x), *self._answer), np.float32)
        self._query(np.ascontiguousarray(x, np.float32), logits, timed=False)
        return logits

    def parts(self, x: np.ndarray) -> dict[str, float]:
        """Median milliseconds of the copy in, the kernels and the copy out, by the device's own clock."""
        logits, rows = np.empty((len(x), *self._answer), np.float32), []
        for _ in range(TIMED):
            self._query(x, logits, timed=True)
            between = zip(self._events, self._events[1:])
            rows.append([self._cuda.between_ms(first, second) for first, second in between])
        return dict(zip(("copy_in", "compute", "copy_out"), np.median(rows, axis=0).tolist()))

    def _query(self, x: np.ndarray, logits: np.ndarray, timed: bool) -> None:
        if x.shape[1:] != self._image or self._batch not in (-1, len(x)):
            raise EngineError(f"the engine takes {[self._batch, *self._image]}, not {list(x.shape)}")
        cuda, stream = self._cuda, self._stream
        steps = (
            lambda: cuda.copy(self._on_device[self._input], x.ctypes.data, x.nbytes, TO_DEVICE, stream),
            lambda: self._compute(x.shape),
            lambda: cuda.copy(logits.ctypes.data, self._on_device[self._output], logits.nbytes, TO_HOST, stream),
        )
        for step, event in zip(steps, self._events):
            if timed:
                cuda.record(event, stream)
            step()
        if timed:
            cuda.record(self._events[-1], stream)
        cuda.wait(stream)

    def _compute(self, shape: tuple[int, ...]) -> None:
        graph = None if self._graphs is None else self._graphs.get(shape[0])
        if graph is not None:
            self._cuda.launch(graph, self._stream)
            return
        if not self._context.set_input_shape(self._input, shape) or not self._context.execute_async_v3(self._stream):
            raise EngineError(f"TensorRT did not run the engine for {list(shape)}")
        if self._graphs is not None:  # the first query of a size sets things up that must not be captured
            self._cuda.wait(self._stream)
            self._cuda.begin_capture(self._stream)
            self._context.execute_async_v3(self._stream)
            self._graphs[shape[0]] = self._cuda.end_capture(self._stream)


def _module(settings: dict[str, Any]) -> Any:
    try:
        return module(settings)
    except ImportError as error:
        raise EngineError(
            "the Python module {} is not here ({}): sudo apt install python3-libnvinfer; before TensorRT 8.5, what"
            " trtexec timed is all there is".format(settings["module"], error)
        ) from error
