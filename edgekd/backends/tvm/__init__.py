"""Apache TVM: compiles the model ahead of time, with LMA as part of the convolution's loop."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgekd.backends import Backend, write_settings
from edgekd.backends.tvm import child, libraries, nvcc
from edgekd.errors import RecipeError, StageError
from edgekd.registry import register
from edgekd.target import Target

ENGINE = "model.so"
BUDGETS: dict[str, dict[str, float] | None] = {
    "none": None,
    "quick": {"trials": 200, "minutes": 5},
    "full": {"trials": 3000, "minutes": 60},
    "unlimited": {"trials": 1_000_000, "minutes": 24 * 60},
}
NEEDED = {"tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi", "onnx": "onnx"}


@register("backend", "tvm")
class Tvm(Backend):
    """Apache TVM, compiled ahead of time for one kind of CPU, or of NVIDIA GPU.

    LMA is computed in the form that is fastest where the model is compiled, or on the board behind `tracker`.
    arch, cpu: what the engine is for, as LLVM calls it: x86_64 or aarch64, and for example cortex-a76. Empty is this
    machine. linker: the C++ compiler that links for `arch`; empty is the usual one.
    gpu: the NVIDIA GPU that computes, as nvcc calls it, for example sm_87; `board` is that of the target's board; empty
    is the CPU. It needs nvcc here, is not tuned, and computes INT8 models in float.
    tuning: how long to search for faster loops: none; quick, minutes; full, an hour; or {trials: N, minutes: M}, one or
    both. Results are kept in the store and serve equal layers of other models, and a killed search goes on.
    tracker: where kernels are timed, HOST:PORT/KEY of TVM's RPC tracker; empty is this machine.
    timeout: seconds that the compiler may take beside tuning.
    """

    name = "tvm"
    precisions = ("fp32", "int8")
    builds_on = "host"
    forms: ClassVar = {"any": "function", "continuous": "function"}
    runner = Path(__file__).with_name("runner.py")

    def __init__(
        self,
        *,
        arch: str = "",
        cpu: str = "",
        gpu: str = "",
        linker: str = "",
        tuning: Literal["none", "quick", "full"] | dict[str, float] = "none",
        tracker: str = "",
        timeout: float = 900.0,
    ) -> None:
        self.arch, self.cpu, self.linker, self.tracker, self.timeout = arch, cpu, linker, tracker, timeout
        self.gpu, self.budget = gpu, _budget(tuning)
        if gpu and (self.budget or tracker):
            raise RecipeError(
                f"backend tvm: gpu = {gpu} cannot be tuned",
                allowed="expected: tuning = none, and no tracker; only a CPU's loops are searched for",
                fix="leave out tuning and tracker, or gpu",
            )
        if tracker and not re.fullmatch(r"[^/]+:\d+/.+", tracker):
            raise RecipeError(
                f"backend tvm: tracker = {tracker!r} is no address",
                allowed="HOST:PORT/KEY, as given to tvm.exec.rpc_tracker and tvm.exec.rpc_server",
                fix="for example tracker = 192.168.0.2:9190/pi",
            )

    @classmethod
    def on_board(cls, options: Mapping[str, Any], target: Target) -> dict[str, Any]:
        """With the board's own GPU in the place of `board`. Raises RecipeError for a GPU that the board has not got."""
        capability = target.board.compute_capability if target.board else None
        own, asked = f"sm_{capability.replace('.', '')}" if capability else "", options["gpu"]
        if asked == "board" and not own:
            raise RecipeError(
                f"{cls.name}.gpu = board: target {target.name} does not say which GPU its board has",
                allowed="expected: a GPU by nvcc's name for it, as sm_87; nvcc --list-gpu-code has all",
                fix="name it, or give the target a board with its compute_capability",
            )
        if asked and own and asked not in ("board", own):
            raise RecipeError(
                f"{cls.name}.gpu = {asked}: the board of target {target.name} is {own}",
                allowed=f"allowed: {own}, or board, which is the same",
                fix="set gpu = board, or name another target",
            )
        return {**options, "gpu": own if asked and own else asked}

    def available(self) -> str:
        """Empty, or why TVM cannot be used here."""
        missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
        if missing:
            return f"{' and '.join(missing)} not installed: pip install 'edgekd[tvm]'"
        return nvcc.missing() if self.gpu else ""

    @property
    def runs_here(self) -> bool:
        """Not what is compiled for another kind of processor or GPU."""
        return self.arch in ("", platform.machine()) and (not self.gpu or child.has_gpu(self.gpu))

    def libraries(self) -> list[Path]:
        """TVM's runtime for what is compiled for."""
        self.require()
        return libraries.libraries(self.arch, gpu=bool(self.gpu))

    def check(self, onnx: Path) -> list[str]:
        """Problems of the file, or found by reading the model as TVM does."""
        self.require()
        from edgekd.backends import model_file

        try:
            model_file.require(onnx)
        except StageError as error:
            return [error.what]
        result = child.run({"onnx": str(onnx), **self._asked(1), "tuning": None}, self.timeout, self.log)
        return [f"tvm cannot compile {onnx.name}: {reason}" for reason in result["refused"]]

    def compile(self, onnx: Path, out: Path, *, threads: int) -> dict[str, Any]:
        """Compile in a process of its own and write the engine and what it needs of the processor."""
        self.require()
        from edgekd.backends import model_file

        model_file.require(onnx)
        result = self._compiled(onnx, out, threads)
        if reasons := result["refused"]:
            raise StageError(
                f"tvm cannot compile {onnx}: {reasons[0]}",
                allowed="it or the backend's options ask for what this TVM does not have",
                fix="export the model again or in another form, correct the options, or use another backend",
            )
        write_settings(out, {"backend": self.name, "threads": threads, **result["settings"]})
        facts: dict[str, Any] = result["facts"]
        return facts

    def _compiled(self, onnx: Path, out: Path, threads: int) -> dict[str, Any]:
        """What the child makes, told about while it tunes."""
        minutes = self.budget["minutes"] if self.budget else 0
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            progress, records = Path(folder, "progress.json"), self.kept or Path(folder)
            job = {"onnx": str(onnx), "engine": str(out / ENGINE), **self._asked(threads), "tuning": self.budget}
            job |= {"records": str(records), "progress": str(progress)}

            def tell() -> None:
                if progress.is_file():
                    self.on_progress(*json.loads(progress.read_text(encoding="utf-8")))

            return child.run(job, self.timeout + 60 * minutes, self.log, watch=tell)

    def _asked(self, threads: int) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in ("arch", "cpu", "gpu", "linker", "tracker")}
        return {**options, "threads": threads}


def _budget(tuning: str | dict[str, float]) -> dict[str, float] | None:
    """When a search ends. Raises RecipeError for what is no budget."""
    if isinstance(tuning, str):
        return BUDGETS[tuning]
    unlimited = BUDGETS["unlimited"]
    assert unlimited is not None
    if not tuning or set(tuning) - set(unlimited) or min(tuning.values()) <= 0:
        raise RecipeError(
            f"backend tvm: tuning = {tuning} is no budget",
            allowed="none, quick, full, or {trials: N, minutes: M} with one or both, above 0",
            fix="set tuning = quick",
        )
    asked = unlimited | tuning
    return {"trials": int(asked["trials"]), "minutes": asked["minutes"]}
