"""Runs an ONNX model with ONNX Runtime. Stands alone: Python 3.8, numpy and onnxruntime."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

# Where the runtime has a telemetry client, it stays off: a user's board reports to nobody. Without the variable, the
# import alone leaves a device id and a data base in the user's home.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime

if hasattr(onnxruntime, "disable_telemetry_events"):
    onnxruntime.disable_telemetry_events()

_LEVELS = {
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
# What a session can raise; the classes have no common one but Exception.
FAILURES = tuple(
    thing
    for thing in vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
    if isinstance(thing, type) and issubclass(thing, Exception)
)
_CPU = "CPUExecutionProvider"


class ProviderError(RuntimeError):
    """A provider that was asked for is not the one that would run."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.known = onnxruntime.get_available_providers()


def session(model: str, settings: dict[str, Any]) -> onnxruntime.InferenceSession:
    """Open `model` with the providers, threads and optimisation level of `settings`, or raise."""
    providers = settings["providers"]
    absent = [name for name in providers if name not in onnxruntime.get_available_providers()]
    if absent:
        raise ProviderError(f"onnxruntime has no {', '.join(absent)} on this machine")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = settings["threads"]
    options.inter_op_num_threads = 1
    options.graph_optimization_level = _LEVELS[settings["graph_optimization"]]
    if _CPU not in providers:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    wanted = ", ".join(providers)
    try:
        opened = onnxruntime.InferenceSession(model, options, providers=providers)
    except FAILURES as error:
        if "fallback to CPU EP" in str(error):
            raise ProviderError(f"onnxruntime would run parts of the model on the CPU, not on {wanted}") from error
        raise
    # onnxruntime lists a provider as available whose libraries or device it then fails to load, and goes on without it.
    unused = [name for name in providers if name not in opened.get_providers()]
    if unused:
        raise ProviderError(f"onnxruntime was asked for {wanted} and uses {', '.join(opened.get_providers())}")
    return opened


class Runner:
    """An open session. `facts` says what really runs."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        self._session = session(model, settings)
        self._input = self._session.get_inputs()[0].name
        self._outputs = [self._session.get_outputs()[0].name]
        self.facts = {
            "runtime": "onnxruntime",
            "version": onnxruntime.__version__,
            "providers": self._session.get_providers(),
            "threads": settings["threads"],
            "graph_optimization": settings["graph_optimization"],
        }

    def run(self, x: np.ndarray) -> np.ndarray:
        """Logits float32 [B, K] of normalised images x float32 [B, C, H, W]."""
        logits = self._session.run(self._outputs, {self._input: x})[0]  # type: np.ndarray
        return logits


def load(folder: str) -> Runner:
    """Open the engine in `folder`."""
    with open(os.path.join(folder, "engine.json")) as file:
        settings = json.load(file)
    return Runner(os.path.join(folder, "model.onnx"), settings)
