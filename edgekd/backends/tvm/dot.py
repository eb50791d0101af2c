"""Instructions that multiply INT8 codes four by four: VNNI of x86 and SDOT of ARM.

TVM has them too, in a package that takes tens of seconds to import because it builds those of every GPU as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm.s_tir import TensorIntrin

_HEAD = """
@T.prim_func(s_tir=True)
def {name}(
    A: T.Buffer((4,), "{code}", offset_factor=1),
    B: T.Buffer(({lanes}, 4), "int8", offset_factor=1),
    C: T.Buffer(({lanes},), "int32", offset_factor=1),
) -> None:
    with T.sblock("root"):
        T.reads(C[0:{lanes}], A[0:4], B[0:{lanes}, 0:4])
        T.writes(C[0:{lanes}])
"""
_MEANING = """
        for i, k in T.grid({lanes}, 4):
            with T.sblock("update"):
                vi, vk = T.axis.remap("SR", [i, k])
                C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")
"""
_INSTRUCTION = """
        quad = T.reinterpret(A.vload([0], "{code}x4"), dtype="int32")
        C[T.ramp(T.int32(0), 1, {lanes})] = T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id("{llvm}"),
            C.vload([0], dtype="int32x{lanes}"),
            T.reinterpret(T.broadcast(quad, {lanes}), dtype="int8x{codes}"),
            B.vload([0, 0], dtype="int8x{codes}"),
            dtype="int32x{lanes}",
        )
"""


@dataclass(frozen=True)
class Dot:
    """An instruction that adds the products of four neighbouring codes to each sum of a vector."""

    name: str
    llvm: str
    lanes: int  # sums of the vector
    offset: int  # what is added to the codes of activations, which it takes as unsigned ones

    def intrinsic(self) -> str:
        """The name by which a schedule asks for it."""
        if TensorIntrin.get(self.name, allow_missing=True) is None:
            TensorIntrin.register(self.name, self._function(_MEANING), self._function(_INSTRUCTION))
        return self.name

    def _function(self, body: str) -> Any:
        code = "uint8" if self.offset else "int8"
        text = (_HEAD + body).format(name=self.name, code=code, lanes=self.lanes, codes=4 * self.lanes, llvm=self.llvm)
        return tvm.script.from_source(text)


VNNI = Dot("edgekd_vnni", "llvm.x86.avx512.vpdpbusd.512", lanes=16, offset=128)
SDOT = Dot("edgekd_sdot", "llvm.aarch64.neon.sdot.v4i32.v16i8", lanes=4, offset=0)
