"""The processor that an engine is made for: its vectors and registers, or the GPU beside it."""

from __future__ import annotations

import difflib
import subprocess
from dataclasses import dataclass, replace
from typing import Any

import tvm

from edgekd.backends.tvm.dot import SDOT, VNNI, Dot

ARCHITECTURES = ("aarch64", "x86_64")
NAMED = 8  # CPUs that an error names
# What LLVM calls an instruction set, and what Linux calls it, where they differ in more than underscores.
LINUX_NAMES = {"dotprod": "asimddp", "fullfp16": "asimdhp", "sve": "sve", "sve2": "sve2"}
# Instruction sets of x86 that code for a newer processor is likely to use.
X86_PREFIXES = ("avx", "fma", "f16c", "gfni")
# What every GPU of the last ten years has.
GPU = {
    "kind": "cuda", "max_threads_per_block": 1024, "max_shared_memory_per_block": 48 << 10, "thread_warp_size": 32
}  # fmt: skip


@dataclass(frozen=True)
class Processor:
    """A CPU as the schedules see it; or with `gpu` the host of one, whose threads compute one value at a time."""

    arch: str  # x86_64 or aarch64
    cpu: str  # LLVM's name
    vector_bits: int
    registers: int  # for vectors
    threads: int
    needs: tuple[str, ...]  # instruction sets, as /proc/cpuinfo calls them without underscores
    dot: Dot | None  # how it multiplies INT8; without one, codes are multiplied as floats
    gpu: str = ""  # as nvcc calls it, for example sm_87

    @property
    def lanes(self) -> int:
        """float32 values of one vector."""
        return self.vector_bits // 32

    @property
    def looks_up_bytes(self) -> bool:
        """Whether it picks bytes from two registers: then a table of 256 entries is never in memory."""
        return "avx512vbmi" in self.needs and not self.gpu

    @property
    def name(self) -> str:
        """What computes."""
        return self.gpu or self.cpu

    def target(self) -> Any:
        """TVM's target."""
        host = tvm.target.Target(_fields(self.arch) | {"mcpu": self.cpu, "num-cores": self.threads})
        return tvm.target.Target(GPU | {"arch": self.gpu}, host) if self.gpu else host


def host_arch() -> str:
    """The architecture of this machine."""
    return str(tvm.target.codegen.llvm_get_system_triple()).partition("-")[0]


def runs_here(processor: Processor) -> bool:
    """Whether this machine's CPU runs what is compiled for the processor."""
    here = processor_of("", "", processor.threads)
    return not processor.gpu and processor.arch == here.arch and set(processor.needs) <= set(here.needs)


def processor_of(arch: str, cpu: str, threads: int) -> Processor:
    """The processor by its LLVM names; empty ones are those of this machine.

    Raises ValueError for one that LLVM does not know.
    """
    arch = arch or host_arch()
    if arch not in ARCHITECTURES:
        raise ValueError(f"{arch} is no architecture that engines are made for: {', '.join(ARCHITECTURES)}")
    if not cpu and arch != host_arch():
        raise ValueError(f"an engine for {arch} needs the option cpu, for example cortex-a76")
    cpu = cpu or str(tvm.target.codegen.llvm_get_system_cpu())
    known = {str(name) for name in tvm.target.codegen.llvm_get_cpu_archlist(tvm.target.Target(_fields(arch)))}
    if cpu not in known:
        close = difflib.get_close_matches(cpu, sorted(known), NAMED, 0.0)
        raise ValueError(f"{cpu} is no CPU of {arch} among the {len(known)} that LLVM knows, as {', '.join(close)}")
    target = tvm.target.Target(_fields(arch) | {"mcpu": cpu})
    features = {str(name) for name in tvm.target.codegen.llvm_get_cpu_features(target)}
    if arch == "aarch64":
        needs = tuple(sorted(LINUX_NAMES[name] for name in features & LINUX_NAMES.keys()))
        return Processor(arch, cpu, 128, 32, threads, needs, SDOT if "dotprod" in features else None)
    needs = tuple(sorted(name for name in features if name.startswith(X86_PREFIXES)))
    wide = {"avx512f", "avx512vl", "avx512dq"} <= features
    dot = VNNI if wide and "avx512vnni" in features else None
    bits = 512 if wide else 256 if "avx2" in features else 128
    return Processor(arch, cpu, bits, 32 if wide else 16, threads, needs, dot)


def with_gpu(host: Processor, gpu: str) -> Processor:
    """The processor whose GPU computes. Raises ValueError for one that nvcc does not compile for."""
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if gpu not in known:
        raise ValueError(f"{gpu} is no GPU that the nvcc here compiles for: {', '.join(known)}")
    return replace(host, vector_bits=32, dot=None, gpu=gpu)


def _fields(arch: str) -> dict[str, Any]:
    return {"kind": "llvm", "mtriple": f"{arch}-linux-gnu"}
