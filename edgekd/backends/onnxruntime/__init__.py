"""ONNX Runtime: the reference backend; runs the ONNX file as it is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgekd.backends import Backend, opening, write_settings
from edgekd.errors import MissingError, StageError
from edgekd.registry import register

# The wheel that has a provider.
WHEELS = {
    **dict.fromkeys(("CUDAExecutionProvider", "TensorrtExecutionProvider"), "pip install onnxruntime-gpu"),
    "OpenVINOExecutionProvider": "pip install onnxruntime-openvino",
}
PROVIDER_ERROR = "ProviderError"  # of the runner
OTHER_WHEEL = "build onnxruntime with it, or name another in the target"


@register("backend", "onnxruntime")
class OnnxRuntime(Backend):
    """ONNX Runtime on CPU, or on any execution provider that the device's wheel has.

    Providers are tried in the given order. One that is asked for and not used is an error, never a slow result: without
    CPUExecutionProvider in the list, no part of the model may fall back to the CPU either.
    codes: of the activations of a quantized model; uint8 is the fast one on x86, int8 on ARM.
    lma_table: whether LMA layers between 8-bit codes become tables of 256 values, which compute the same; auto takes
    the faster of both, measured where the model is compiled.
    """

    name = "onnxruntime"
    precisions = ("fp32", "fp16", "int8")
    builds_on = "host"
    forms: ClassVar = {"any": "step_gemm", "continuous": "max_gemm"}
    runner = Path(__file__).with_name("runner.py")
    device_packages = ("onnxruntime",)

    def __init__(
        self,
        *,
        providers: list[str] = ["CPUExecutionProvider"],  # noqa: B006
        graph_optimization: Literal["disabled", "basic", "extended", "all"] = "all",
        codes: Literal["uint8", "int8"] = "uint8",
        lma_table: Literal["auto", "never", "always"] = "auto",
    ) -> None:
        self.providers, self.graph_optimization, self.lma_table = list(providers), graph_optimization, lma_table
        self.dialect = "onnxruntime_uint8" if codes == "uint8" else "onnxruntime_int8"

    def available(self) -> str:
        """Empty, or why ONNX Runtime cannot be used here."""
        missing = [package for package in ("onnx", "onnxruntime") if importlib.util.find_spec(package) is None]
        if missing:
            return f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}"
        return self._absent_provider()

    def check(self, onnx: Path) -> list[str]:
        """Problems of the file, or found by making a session."""
        self.require()
        try:
            with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
                found = self._opened(onnx, Path(folder), threads=1)
        except StageError as error:
            return [error.what]
        if found.get("kind") == PROVIDER_ERROR:
            return [found["error"]]
        return [f"onnxruntime cannot load {onnx.name}: {_text(found['error'])}"] if "error" in found else []

    def compile(self, onnx: Path, out: Path, *, threads: int) -> dict[str, Any]:
        """Write the model and prove, in a process of its own, that it loads with exactly the providers asked for."""
        self.require()
        from edgekd.backends.onnxruntime import lma_tables

        found = self._opened(onnx, out, threads)
        if found.get("kind") == PROVIDER_ERROR:
            version = importlib.metadata.version("onnxruntime")
            raise MissingError(
                found["error"],
                allowed=f"onnxruntime {version} has here: {', '.join(found['known'])}",
                fix="choose among these, or install a wheel that has it, for CUDA: pip install onnxruntime-gpu",
            )
        if "error" in found:
            raise StageError(
                f"onnxruntime cannot load {onnx}: {_text(found['error'])}",
                allowed="it asks for what this onnxruntime does not have",
                fix="export the model in another form or a lower opset",
            )
        tables = lma_tables.put(out / "model.onnx", self._settings(threads), self.lma_table)
        return {**found["facts"], **tables, "onnx": importlib.metadata.version("onnx")}

    def _opened(self, onnx: Path, folder: Path, threads: int) -> dict[str, Any]:
        from edgekd.backends import model_file

        model_file.require(onnx, open_sizes=True)
        model_file.write(onnx, folder / "model.onnx")
        write_settings(folder, self._settings(threads))
        return opening.opened(self, onnx, folder)

    def _absent_provider(self) -> str:
        """Told before anything is trained; for the CPU alone, which is always there, the runtime is not imported."""
        if self.providers == ["CPUExecutionProvider"]:
            return ""
        import onnxruntime

        known = onnxruntime.get_available_providers()
        absent = [provider for provider in self.providers if provider not in known]
        return f"onnxruntime has no {absent[0]} on this machine: {WHEELS.get(absent[0], OTHER_WHEEL)}" if absent else ""

    def _settings(self, threads: int) -> dict[str, Any]:
        return {
            "backend": self.name,
            "threads": threads,
            "providers": self.providers,
            "graph_optimization": self.graph_optimization,
        }


def _text(error: str) -> str:
    """The sentence a user can act on, without the C++ source locations that onnxruntime puts around it."""
    text = error.strip().split("\n\n")[0]
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from \S+ failed: ?", "", text)
    return re.sub(r"/\S+\.(h|cc|cpp):\d+ .*?\) (?=[A-Z])", "", text)
