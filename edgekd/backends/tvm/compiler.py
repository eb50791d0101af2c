"""From ONNX to a shared library. Runs in a process of its own: `python -m edgekd.backends.tvm.compiler JOB RESULT`.

Both are JSON files. The job: onnx, arch, cpu, linker, threads, and `engine`, the library to write; without it the model
is only read. The result: `refused`, sentences on why nothing was made; else `facts` and the runner's `settings`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

# TVM imports torch where it is installed: seconds and hundreds of megabytes for nothing that is needed here.
if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]

import tvm
import tvm.relax.backend.cpu_generic.pipeline as cpu
from tvm import relax
from tvm.support import cc

from edgekd.backends.tvm.importer import import_model
from edgekd.backends.tvm.processor import Processor, host_arch, processor_of
from edgekd.backends.tvm.products import INTEGER_CONVOLUTION
from edgekd.backends.tvm.schedules import cpu_schedules

LINKERS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}


def main() -> None:
    """Do the job."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(result_of(job)), encoding="utf-8")


def result_of(job: dict[str, Any]) -> dict[str, Any]:
    """What the child writes."""
    try:
        processor = processor_of(job["arch"], job["cpu"], job["threads"])
        module = import_model(Path(job["onnx"]), processor)
        linker = linker_for(processor, job["linker"])
    except (tvm.error.OpNotImplemented, ValueError) as error:
        return {"refused": [str(error).strip().splitlines()[0]]}
    if "engine" not in job:
        return {"refused": []}
    executable, kernels = build(module, processor)
    engine = Path(job["engine"])
    executable.export_library(str(engine), fcompile=cc.cross_compiler(linker) if linker else None)
    version = tvm.__version__
    facts = {
        "runtime": "tvm", "version": version, "providers": [processor.cpu], "threads": processor.threads,
        "kernels": len(kernels), "int8_kernels": sum(INTEGER_CONVOLUTION in kernel.name for kernel in kernels),
        "unscheduled": [kernel.name for kernel in kernels if not kernel.scheduled],
    }  # fmt: skip
    settings = {
        "version": version, "arch": processor.arch, "cpu": processor.cpu, "needs": list(processor.needs),
        "sha256": hashlib.sha256(engine.read_bytes()).hexdigest(),
    }  # fmt: skip
    return {"refused": [], "facts": facts, "settings": settings}


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


def build(module: Any, processor: Processor) -> tuple[Any, list[Kernel]]:
    """The executable, and the kernels that one inference calls."""
    target, kernels = processor.target(), list[Kernel]()

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def count(module: Any, context: Any) -> Any:
        del context

        def note(expression: Any) -> None:
            if isinstance(expression, relax.Call) and expression.op == tvm.ir.Op.get("relax.call_tir"):
                called = expression.args[0]
                scheduled = bool(module[called].attrs.get("tirx.is_scheduled", False))
                kernels.append(Kernel(str(called.name_hint), scheduled))

        relax.analysis.post_order_visit(module["main"], note)
        return module

    transform = relax.transform
    passes = [
        *cpu.library_dispatch_passes(target),
        transform.DeadCodeElimination(["main"]),
        transform.DecomposeOpsForInference(),
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.DeadCodeElimination(["main"]),
        cpu_schedules(processor),
        count,
        *cpu.dataflow_lower_passes(target),
        *cpu.finalize_passes(target),
    ]

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def pipeline(module: Any, context: Any) -> Any:
        del context
        with target:
            return tvm.transform.Sequential(passes)(module)

    return relax.build(module, target=target, relax_pipeline=pipeline), kernels


if __name__ == "__main__":
    main()
