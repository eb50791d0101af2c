"""From ONNX to a shared library. Runs in a process of its own: `python -m edgekd.backends.tvm.compiler JOB RESULT`.

Both are JSON files. The job: onnx, arch, cpu, gpu, linker, threads, and `engine`, the library to write; without it the
model is only read; `tuning`, None or the search's trials and minutes, with `tracker`, the folder of `records` and the
file for `progress`. The result: `refused`, sentences on why nothing was made; else `facts` and the runner's `settings`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# TVM imports torch where it is installed: seconds and hundreds of megabytes for nothing that is needed here.
if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]

import tvm
import tvm.relax.backend.cpu_generic.pipeline as cpu
import tvm.relax.backend.cuda.pipeline as cuda
from tvm import relax, tirx
from tvm.support import cc

from edgekd.artifact import write_synced
from edgekd.backends.tvm import schedules
from edgekd.backends.tvm.clock import BoardClock, Clock
from edgekd.backends.tvm.forms import FormChooser
from edgekd.backends.tvm.gpu_schedules import gpu_schedules, launches
from edgekd.backends.tvm.importer import import_model
from edgekd.backends.tvm.processor import Processor, host_arch, processor_of, runs_here, with_gpu
from edgekd.backends.tvm.products import INTEGER
from edgekd.backends.tvm.schedules import Plan, cpu_schedules
from edgekd.backends.tvm.tuning import Budget, Records, kernel_calls, tasks_of, tune

NO_CLOCK = (
    "an engine for {} cannot be timed here: name the tracker of a board (option tracker, as HOST:PORT/KEY),"
    " or set tuning = none"
)
PR_SET_PDEATHSIG = 1  # of Linux
QUANTILES = {"low": 0.25, "median": 0.5, "high": 0.75}
LINKERS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}


def main() -> None:
    """Do the job."""
    ctypes.CDLL(None).prctl(
        PR_SET_PDEATHSIG, signal.SIGKILL
    )  # a search may take an hour: it ends with who asked for it
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(result_of(job)), encoding="utf-8")


def result_of(job: dict[str, Any]) -> dict[str, Any]:
    """What the child writes."""
    try:
        processor = processor_of(job["arch"], job["cpu"], job["threads"])
        if job["gpu"]:
            processor = with_gpu(processor, job["gpu"])
        linker = linker_for(processor, job["linker"])
        clock = clock_for(processor, linker, job["tracker"]) if "engine" in job else None
        forms = FormChooser(processor, clock)
        module = import_model(Path(job["onnx"]), processor, forms)
        if job["tuning"] and not clock:
            raise ValueError(NO_CLOCK.format(processor.name))
    except (tvm.error.OpNotImplemented, ValueError) as error:
        return {"refused": [str(error).strip().splitlines()[0]]}
    if "engine" not in job:
        return {"refused": []}
    module = fused(module, processor)
    built, found = build(module, processor, {}), None
    if clock and job["tuning"]:
        built, found = tuned(module, built, clock, job)
    engine = Path(job["engine"])
    built.executable.export_library(str(engine), fcompile=cc.cross_compiler(linker) if linker else None)
    version = tvm.__version__
    facts = {
        "runtime": "tvm", "version": version, "providers": [processor.name], "threads": processor.threads,
        "kernels": len(built.kernels),
        "int8_kernels": sum(INTEGER in kernel.name for kernel in built.kernels),
        "unscheduled": [kernel.name for kernel in built.kernels if not kernel.scheduled],
        "lma": list(forms.chosen.values()),
        "tuning": found,
    }  # fmt: skip
    settings = {
        "version": version, "arch": processor.arch, "cpu": processor.cpu, "needs": list(processor.needs),
        "gpu": processor.gpu,
        "sha256": hashlib.sha256(engine.read_bytes()).hexdigest(),
    }  # fmt: skip
    return {"refused": [], "facts": facts, "settings": settings}


def clock_for(processor: Processor, linker: str, tracker: str) -> Clock | None:
    """Where kernels are timed, if the engine runs anywhere. Raises ValueError when the tracker has no board."""
    if tracker:
        return BoardClock(processor, tracker, linker)
    return Clock(processor) if runs_here(processor) else None


class Built(NamedTuple):
    """A whole model, compiled, and the kernels that one inference calls."""

    executable: Any
    kernels: list[Kernel]


def tuned(module: Any, untuned: Built, clock: Clock, job: dict[str, Any]) -> tuple[Built, dict[str, Any]]:
    """The faster of the tuned and the untuned engine, measured in turn, and facts of the search."""
    progress, start, trials = Path(job["progress"]), time.monotonic(), 0

    def on_best(tried: int, best: float, first: float) -> None:
        nonlocal trials
        trials = tried
        share = min(1.0, max(tried / budget.trials, (time.monotonic() - start) / (60 * budget.minutes)))
        text = f"tuning: trial {tried}, kernels take {1e3 * best:.3f} ms, {best / first:.2f} of untuned"
        write_synced(progress, json.dumps([share, text]))

    budget, tasks = Budget(**job["tuning"]), tasks_of(module, clock.processor)
    records = Records(Path(job["records"], records_name(clock.processor)))
    known = sum(plan in task.plans for task in tasks for plan in records.known.get(task.key, ()))
    chosen = tune(tasks, clock, records, budget, on_best)
    found: dict[str, Any] = {"tasks": len(tasks), "trials": trials, "known": known, "kept": "untuned", "ratio": None}
    if any(chosen[task.key] != task.plans[0] for task in tasks):
        candidate = build(module, clock.processor, chosen)
        shape = [int(size) if isinstance(size, tirx.IntImm) else 1 for size in module["main"].params[0].ty.shape]
        turns = clock.engines([untuned.executable, candidate.executable], shape)
        ratios = sorted(tuned_s / untuned_s for untuned_s, tuned_s in turns)
        found["ratio"] = {name: ratios[int(share * (len(ratios) - 1))] for name, share in QUANTILES.items()}
        if found["ratio"]["median"] < 1:
            untuned, found["kept"] = candidate, "tuned"
    return untuned, found | {"seconds": time.monotonic() - start}


def records_name(processor: Processor) -> str:
    """Results hold for one processor, number of threads, release of TVM and set of schedules."""
    source = Path(schedules.__file__).read_bytes() + tvm.__version__.encode()
    return f"{processor.arch}-{processor.cpu}-{processor.threads}-{hashlib.sha256(source).hexdigest()[:16]}.jsonl"


def linker_for(processor: Processor, asked: str) -> str:
    """The C++ compiler that links for the processor; empty is this machine's own. Raises ValueError: there is none."""
    if not asked and processor.arch == host_arch():
        return ""
    linker = asked or LINKERS.get(processor.arch, "")
    if shutil.which(linker) is None:
        raise ValueError(f"nothing links for {processor.arch}: {linker} is not installed, and no linker is named")
    return linker


class Kernel(NamedTuple):
    """One call of a loop nest; without a schedule it is right, and slow."""

    name: str
    scheduled: bool


def fused(module: Any, processor: Processor) -> Any:
    """The module with its operators as few loop nests."""
    target, transform = processor.target(), relax.transform
    with target:
        return tvm.transform.Sequential(
            [
                *lowering(processor).library_dispatch_passes(target),
                transform.DeadCodeElimination(["main"]),
                transform.DecomposeOpsForInference(),
                transform.LegalizeOps(),
                transform.AnnotateTIROpPattern(),
                transform.FoldConstant(),
                transform.FuseOps(),
                transform.FuseTIR(),
                transform.DeadCodeElimination(["main"]),
            ]
        )(module)


def build(module: Any, processor: Processor, chosen: Mapping[str, Plan]) -> Built:
    """Compile a fused module, its kernels scheduled as chosen."""
    target, kernels, lower = processor.target(), list[Kernel](), lowering(processor)

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def count(module: Any, context: Any) -> Any:
        del context
        for called in kernel_calls(module):
            scheduled = bool(module[called].attrs.get("tirx.is_scheduled", False))
            parts = launches(module[called]) if processor.gpu else 1
            kernels.extend([Kernel(str(called.name_hint), scheduled)] * parts)
        return module

    no_reshapes, *dataflow = lower.dataflow_lower_passes(target)  # they become views, of which nothing is computed
    passes = [
        gpu_schedules(processor) if processor.gpu else cpu_schedules(processor, chosen),
        no_reshapes,
        count,
        *dataflow,
        *lower.finalize_passes(target),
    ]

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def pipeline(module: Any, context: Any) -> Any:
        del context
        with target:
            return tvm.transform.Sequential(passes)(module)

    fresh = tvm.IRModule(dict(module.functions_items()))  # scheduling changes a module in place
    with target:  # nvcc is asked for code for the target that is the current one
        return Built(relax.build(fresh, target=target, relax_pipeline=pipeline), kernels)


def lowering(processor: Processor) -> Any:
    """TVM's own passes for what computes."""
    return cuda if processor.gpu else cpu


if __name__ == "__main__":
    main()
