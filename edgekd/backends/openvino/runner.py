"""Runs an ONNX model with OpenVINO. Stands alone: Python 3.8, numpy and openvino."""

from __future__ import annotations

import collections
import json
import os
import sys
from typing import Any

import numpy as np

# Importing openvino reports to its makers where that package is installed: a user's board reports to nobody.
_telemetry = sys.modules.get("openvino_telemetry")
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
import openvino  # noqa: E402

if _telemetry is None:
    del sys.modules["openvino_telemetry"]
else:
    sys.modules["openvino_telemetry"] = _telemetry

# Nodes of a compiled model that compute nothing.
_PASSIVE = {"Const", "Input", "Output", "Reshape"}


class DeviceError(RuntimeError):
    """OpenVINO does not have the device that was asked for, or would run on another."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.known = openvino.Core().available_devices


class Runner:
    """A compiled model. `facts` says what really runs."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        self._core, self._settings = openvino.Core(), settings
        device = settings["device"]
        if device.partition(".")[0] not in {known.partition(".")[0] for known in self._core.available_devices}:
            raise DeviceError(f"openvino has no {device} on this machine")
        self._model = self._core.read_model(model)
        self._requests = {}  # type: dict[int, Any]
        shape = self._model.inputs[0].partial_shape
        self._image = [dimension.get_length() for dimension in list(shape)[1:]]
        compiled = self._compiled(shape[0].get_length() if shape[0].is_static else 1)
        used = compiled.get_property("EXECUTION_DEVICES")
        if any(name.partition(".")[0] != device.partition(".")[0] for name in used):
            raise DeviceError(f"openvino was asked for {device} and uses {', '.join(used)}")
        self.facts = {
            "runtime": "openvino",
            "version": openvino.__version__,
            "providers": list(used),
            "threads": settings["threads"],
            "precision": settings["precision"],
            "kernels": _kernels(compiled),
        }

    def run(self, x: np.ndarray) -> np.ndarray:
        """Logits float32 [B, K] of normalised images x float32 [B, C, H, W]."""
        if len(x) not in self._requests:
            self._compiled(len(x))
        request = self._requests[len(x)]
        request.infer([x])
        logits = request.get_output_tensor(0).data.copy()  # type: np.ndarray
        return logits

    def _compiled(self, batch: int) -> Any:
        """Compile for one batch size: with all shapes known, memory and loops are planned ahead."""
        self._model.reshape([batch, *self._image])
        wanted = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": self._settings["precision"],
        }
        if self._settings["device"] == "CPU":
            wanted["INFERENCE_NUM_THREADS"] = self._settings["threads"]
        compiled = self._core.compile_model(self._model, self._settings["device"], wanted)
        self._requests[batch] = compiled.create_infer_request()
        return compiled


def _kernels(compiled: Any) -> dict[str, int]:
    """How many kernels of each kind the compiled model has, for example {"Convolution brgconv_avx512_I8": 19}."""
    names = []  # type: list[str]
    for node in compiled.get_runtime_model().get_ops():
        told = node.get_rt_info()
        kind, kernel = (told[key].astype(str) if key in told else "" for key in ("layerType", "primitiveType"))
        if kind not in _PASSIVE:
            names.append(f"{kind} {kernel}".strip())
    return dict(sorted(collections.Counter(names).items()))


def load(folder: str) -> Runner:
    """Open the engine in `folder`."""
    with open(os.path.join(folder, "engine.json")) as file:
        settings = json.load(file)
    return Runner(os.path.join(folder, "model.onnx"), settings)
