"""Apache TVM: compiles the model ahead of time, with LMA as part of the convolution's loop."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

from edgekd.backends import Backend, write_settings
from edgekd.backends.tvm import child, libraries
from edgekd.errors import StageError
from edgekd.registry import register

ENGINE = "model.so"
NEEDED = {"tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi", "onnx": "onnx"}


@register("backend", "tvm")
class Tvm(Backend):
    """Apache TVM on a CPU, compiled ahead of time for one kind of processor.

    arch, cpu: what the engine is for, as LLVM calls it: x86_64 or aarch64, and for example cortex-a76. Empty is this
    machine. linker: the C++ compiler that links for `arch`; empty is the usual one.
    timeout: seconds that the compiler may take.
    """

    name = "tvm"
    precisions = ("fp32", "int8")
    builds_on = "host"
    forms: ClassVar = {"any": "where", "continuous": "relu_sum"}
    runner = Path(__file__).with_name("runner.py")

    def __init__(self, *, arch: str = "", cpu: str = "", linker: str = "", timeout: float = 900.0) -> None:
        self.arch, self.cpu, self.linker, self.timeout = arch, cpu, linker, timeout

    def available(self) -> str:
        """Empty, or why TVM cannot be used here."""
        missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
        return f"{' and '.join(missing)} not installed: pip install 'edgekd[tvm]'" if missing else ""

    def libraries(self) -> list[Path]:
        """TVM's runtime for the processor that is compiled for."""
        self.require()
        return libraries.libraries(self.arch)

    def check(self, onnx: Path) -> list[str]:
        """Problems found by onnx's checker and by reading the model as TVM does."""
        self.require()
        if problems := _invalid(onnx):
            return problems
        result = child.run({"onnx": str(onnx), **self._asked(1)}, self.timeout)
        return [f"tvm cannot compile {onnx.name}: {reason}" for reason in result["refused"]]

    def compile(self, onnx: Path, out: Path, *, threads: int) -> dict[str, Any]:
        """Compile in a process of its own and write the engine, what it needs of the processor, and the log."""
        self.require()
        (out / "log").mkdir(exist_ok=True)
        job = {"onnx": str(onnx), "engine": str(out / ENGINE), **self._asked(threads)}
        refused = _invalid(onnx)
        result = {} if refused else child.run(job, self.timeout, out / "log" / "tvm.log")
        if reasons := refused or result["refused"]:
            raise StageError(
                f"tvm cannot compile {onnx}: {reasons[0]}",
                allowed="the file is damaged, or it or the backend's options ask for what this TVM does not have",
                fix="export the model again or in another form, correct the options, or use another backend",
            )
        write_settings(out, {"backend": self.name, "threads": threads, **result["settings"]})
        facts: dict[str, Any] = result["facts"]
        return facts

    def _asked(self, threads: int) -> dict[str, Any]:
        return {"arch": self.arch, "cpu": self.cpu, "linker": self.linker, "threads": threads}


def _invalid(path: Path) -> list[str]:
    """What onnx's checker says of a file."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return [f"{path.name} is not valid ONNX: {str(error).strip().splitlines()[0]}"]
    return []
