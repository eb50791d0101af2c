"""OpenVINO: Intel's runtime for CPUs, x86 and ARM, and its own GPUs and NPUs; fuses LMA into one loop."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgekd.backends import Backend, opening, write_settings
from edgekd.errors import MissingError, StageError
from edgekd.marks import LMA_MARK
from edgekd.registry import register

NEEDED = ("onnx", "openvino")
DEVICE_ERROR = "DeviceError"  # of the runner


@register("backend", "openvino")
class OpenVino(Backend):
    """OpenVINO on the device that it calls CPU, GPU or NPU; one that is asked for and not used is an error.

    precision: that of layers which are not quantized. OpenVINO's own choice would be bf16 or f16 where the processor is
    faster in it, and another network than the one that was validated.
    """

    name = "openvino"
    precisions = ("fp32", "fp16", "int8")
    builds_on = "host"
    # Between 8-bit codes, clip_sum comes out wrong by a fifth of the largest logit; relu_sum, as fast, does not. With
    # zero point 128, as ONNX Runtime likes it, OpenVINO cannot compile residual networks: it gets symmetric int8.
    forms: ClassVar = {"any": "number_sum", "continuous": "relu_sum"}
    runner = Path(__file__).with_name("runner.py")
    device_packages = ("openvino",)

    def __init__(self, *, device: str = "CPU", precision: Literal["f32", "bf16", "f16"] = "f32") -> None:
        self.device, self.precision = device, precision

    def available(self) -> str:
        """Empty, or why OpenVINO cannot be used here."""
        missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
        return f"{' and '.join(missing)} not installed: pip install 'edgekd[openvino]'" if missing else ""

    def check(self, onnx: Path) -> list[str]:
        """Problems of the file, among the layers, or found by compiling the model."""
        self.require()
        try:
            with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
                found = self._opened(onnx, Path(folder), threads=1)
        except StageError as error:
            return [error.what]
        if found.get("kind") == DEVICE_ERROR:
            return [found["error"]]
        return [f"openvino cannot compile {onnx.name}: {_text(found['error'])}"] if "error" in found else []

    def compile(self, onnx: Path, out: Path, *, threads: int) -> dict[str, Any]:
        """Write the model and prove, in a process of its own, that it compiles for exactly the device asked for."""
        self.require()
        found = self._opened(onnx, out, threads)
        if found.get("kind") == DEVICE_ERROR:
            raise MissingError(
                found["error"],
                allowed=f"openvino has here: {', '.join(found['known'])}",
                fix="choose among these: {openvino: {device: CPU}} in the target",
            )
        if "error" in found:
            raise StageError(
                f"openvino cannot compile {onnx}: {_text(found['error'])}",
                allowed="it asks for what this OpenVINO does not have",
                fix="export the model in another form, or use another backend",
            )
        facts: dict[str, Any] = found["facts"]
        return facts

    def _opened(self, onnx: Path, folder: Path, threads: int) -> dict[str, Any]:
        _write(onnx, folder / "model.onnx")
        write_settings(folder, self._settings(threads))
        return opening.opened(self, onnx, folder)

    def _settings(self, threads: int) -> dict[str, Any]:
        return {"backend": self.name, "threads": threads, "device": self.device, "precision": self.precision}


def _write(file: Path, out: Path) -> None:
    """The model as OpenVINO computes it right. Raises StageError for one that it is known to get wrong."""
    import onnx

    from edgekd.backends import model_file
    from edgekd.backends.openvino.joins import kept_apart

    model_file.require(file)
    model_file.write(file, out)
    model = onnx.load(str(out))
    if not any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        return
    if clipped := sorted({entry.value for node in model.graph.node if node.op_type == "Clip"
                          for entry in node.metadata_props if entry.key == LMA_MARK}):  # fmt: skip
        raise StageError(
            f"LMA in clip_sum, which openvino computes wrongly between 8-bit codes: {', '.join(clipped)}",
            allowed="right between codes: relu_sum, number_sum",
            fix="set export.form = relu_sum",
        )
    onnx.save(kept_apart(model), str(out))


def _text(error: str) -> str:
    """The line that says what is wrong, without the places in OpenVINO's source around it."""
    lines = [line.strip() for line in error.strip().splitlines()]
    told = [
        line for line in lines if line and not line.startswith(("Exception from", "Check ", "FrontEnd API", "Summary"))
    ]
    return (told or lines)[-1].removeprefix("-- ")
