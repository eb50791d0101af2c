"""trtexec, where TensorRT's Python module is not: builds the engine, and times it.

Its options differ by release, so what each release is asked for stands in `DIALECTS`; every command that was run is
kept in the result as it was given.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from typing import Any

from .build import LAYERS, MODEL, PLAN, TIMING_CACHE, finished, settings_of

# From a release on: how it is told to stop after building, what precisions and limits are called, and what it must be
# told in order to time the kernels alone: through a CUDA graph, with a spinning wait, without the copies. In 11 that is
# what it does when told nothing, so a comparison of releases needs all three said or all three default.
_KERNELS_ALONE = ("--useCudaGraph", "--useSpinWait", "--noDataTransfers")
_WITH_FLAGS = {"fp32": (), "fp16": ("--fp16",), "int8": ("--int8", "--fp16")}
_TYPED = dict.fromkeys(_WITH_FLAGS, ("--stronglyTyped",))
DIALECTS = (
    {
        "since": (8, 0), "build_only": "--buildOnly", "precision": _WITH_FLAGS, "workspace": "--workspace={mib}",
        "level": "", "percentile": "99", "kernels_alone": _KERNELS_ALONE, "end_to_end": (),
    },
    {
        "since": (8, 5), "build_only": "--buildOnly", "precision": _WITH_FLAGS,
        "workspace": "--memPoolSize=workspace:{mib}M", "level": "", "percentile": "50,90,95,99",
        "kernels_alone": _KERNELS_ALONE, "end_to_end": (),
    },
    {
        "since": (8, 6), "build_only": "--skipInference", "precision": _WITH_FLAGS,
        "workspace": "--memPoolSize=workspace:{mib}M", "level": "--builderOptimizationLevel={level}",
        "percentile": "50,90,95,99", "kernels_alone": _KERNELS_ALONE, "end_to_end": (),
    },
    {
        "since": (10, 0), "build_only": "--skipInference", "precision": _TYPED,
        "workspace": "--memPoolSize=workspace:{mib}M", "level": "--builderOptimizationLevel={level}",
        "percentile": "50,90,95,99", "kernels_alone": _KERNELS_ALONE, "end_to_end": (),
    },
    {
        "since": (11, 0), "build_only": "--skipInference", "precision": dict.fromkeys(_WITH_FLAGS, ()),
        "workspace": "--memPoolSize=workspace:{mib}M", "level": "--builderOptimizationLevel={level}",
        "percentile": "50,90,95,99", "kernels_alone": (),
        "end_to_end": ("--includeDataTransfers", "--noCudaGraph", "--noSpinWait"),
    },
)  # type: tuple[dict[str, Any], ...]  # fmt: skip
_NUMBER = r"(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_SUMMARIES = {
    "latency": "Latency", "enqueue": "Enqueue Time", "copy_in": "H2D Latency", "compute": "GPU Compute Time",
    "copy_out": "D2H Latency",
}  # fmt: skip


class TrtexecError(RuntimeError):
    """trtexec failed; its last lines are the message, its last error the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        errors = re.findall(r"\[E\] (.*)", message)
        self.reason = "trtexec failed: " + errors[-1] if errors else message


def dialect(version: tuple[int, ...]) -> dict[str, Any]:
    """The last dialect that is not newer than a version, as (10, 3)."""
    return next((one for one in reversed(DIALECTS) if one["since"] <= version), DIALECTS[0])


def build_argv(program: str, version: tuple[int, ...], settings: dict[str, Any], image: str) -> list[str]:
    """The command that builds the model in the current folder. image: name and largest shape, as `images:1x3x32x32`;
    empty where the model's shapes are fixed."""
    words = dialect(version)
    argv = [
        program,
        f"--onnx={MODEL}",
        f"--saveEngine={PLAN}",
        words["build_only"],
        *words["precision"][settings["precision"]],
    ]
    if settings["workspace_bytes"]:
        argv.append(words["workspace"].format(mib=settings["workspace_bytes"] >> 20))
    if words["level"]:
        argv.append(words["level"].format(level=settings["optimization_level"]))
    if version >= (8, 5):
        argv += [f"--timingCacheFile={TIMING_CACHE}", "--profilingVerbosity=detailed", f"--exportLayerInfo={LAYERS}"]
    if image:
        one = re.sub(r":\d+x", ":1x", image)
        argv += [f"--minShapes={one}", f"--optShapes={one}", f"--maxShapes={image}"]
    if settings["dla_core"] >= 0:
        argv += [f"--useDLACore={settings['dla_core']}", "--allowGPUFallback"]
    return argv


def time_argv(program: str, version: tuple[int, ...], *, seconds: float, end_to_end: bool) -> list[str]:
    """The command that times the engine in the current folder: the kernels alone, or with copies in and out."""
    words = dialect(version)
    return [
        program, f"--loadEngine={PLAN}", "--warmUp=1000", f"--duration={seconds:g}", "--iterations=200",
        "--avgRuns=100", f"--percentile={words['percentile']}",
        *words["end_to_end" if end_to_end else "kernels_alone"],
    ]  # fmt: skip


def version_from(log: str) -> tuple[int, ...]:
    """(10, 3, 0) of `[TensorRT v100300]`, (8, 5, 2) of `[TensorRT v8502]`; the first line of every run has it."""
    found = re.search(r"\[TensorRT v(\d+)\]", log)
    if not found:
        raise TrtexecError("it does not say its version:\n" + "\n".join(log.splitlines()[:3]))
    digits = found.group(1)
    if len(digits) > 4:
        return int(digits[:-4]), int(digits[-4:-2]), int(digits[-2:])
    return int(digits[0]), int(digits[1]), int(digits[2:])


def timings_from(log: str) -> dict[str, Any]:
    """Milliseconds by part (min, max, mean, median, p90, ...), throughput_per_s, and what it warned of."""
    found = {"warnings": re.findall(r"\[W\] \* (.*)", log)}  # type: dict[str, Any]
    throughput = re.search(rf"Throughput: {_NUMBER} qps", log)
    found["throughput_per_s"] = float(throughput.group(1)) if throughput else None
    for name, title in _SUMMARIES.items():
        # Verbose logs explain each title in words, without numbers.
        line = re.search(rf"\] {title}: (min = .*)", log)
        if line:
            entries = re.findall(rf"(\w+)(?:\((\d+)%\))? = {_NUMBER} ms", line.group(1))
            found[name] = {f"p{percent}" if percent else what: float(value) for what, percent, value in entries}
    return found


def run(argv: list[str], folder: str, log: str) -> str:
    """Run it in the engine's folder and keep all that it says in the file `log`; raises TrtexecError when it fails."""
    with open(os.path.join(folder, log), "w+", encoding="utf-8", errors="replace") as file:
        status = subprocess.call(argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        file.seek(0)
        text = file.read()
    if status or "&&&& PASSED" not in text:
        raise TrtexecError("{} failed ({}):\n{}".format(" ".join(argv), status, "\n".join(text.splitlines()[-8:])))
    return text


class Trtexec:
    """The program at a path, whose version is asked for first."""

    def __init__(self, program: str) -> None:
        self.program = program
        # It has no option for this, but says it before it complains of anything.
        asked = subprocess.run([program, "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        self.version = version_from(asked.stdout.decode("utf-8", "replace"))

    @property
    def version_text(self) -> str:
        """10.3.0"""
        return ".".join(map(str, self.version))

    def build(self, folder: str, identity: dict[str, Any], *, seconds: float) -> dict[str, Any]:
        """Build and time the engine in a folder, as `build.build` does with the module; what each command said is
        in folder/trtexec-*.log. seconds: that each timing takes."""
        argv = build_argv(self.program, self.version, settings_of(folder), settings_of(folder)["profile"])
        result = {
            "module": "trtexec", "version": self.version_text, "mode": "trtexec", "tried": [], "identity": identity,
            "refused": [], "seconds": 0.0, "argv": [argv], "timed": {},
        }  # type: dict[str, Any]  # fmt: skip
        with contextlib.suppress(OSError):
            os.remove(os.path.join(folder, LAYERS))
        started = time.monotonic()
        try:
            run(argv, folder, "trtexec-build.log")
            result["seconds"] = time.monotonic() - started
            for name in ("kernels_alone", "end_to_end"):
                argv = time_argv(self.program, self.version, seconds=seconds, end_to_end=name == "end_to_end")
                result["argv"].append(argv)
                result["timed"][name] = timings_from(run(argv, folder, f"trtexec-{name}.log"))
        except TrtexecError as error:
            print(error)
            result["refused"] = [error.reason]
        return finished(folder, result)
