"""LMA as an instruction of TVM's: loop nests carry it as one value, and it is spelled out when loops are vectors.

`lma(x)` is y = slopes[j] x + biases[j] for x in (cuts[j-1], cuts[j]]. FORMS of it, with what a vector of x costs:

    index    the segment's number from the equal width of all, then slope and bias picked from two registers: 5 or 6
             instructions whatever k is, where there is one that picks by lane; right of a cut a few roundings of x
             still belong to the left segment
    sum      a line plus one scaled maximum per cut: 2 k - 1; only for segments that meet
    select   every cut is compared, and the last one that is passed wins: 3 k - 2

`looked_up(code)` is an entry of a table of 256 bytes: an LMA layer between two roundings to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import tvm
from tvm import tirx
from tvm.ir import _ffi_api

Array = npt.NDArray[Any]
Form = Literal["index", "sum", "select"]
FORMS: tuple[Form, ...] = ("index", "sum", "select")
LMA, TABLE = "tirx.edgekd_lma", "tirx.edgekd_table"
# What picks float32 values from a register by lane: LLVM's names, by lanes.
PERMUTE = {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx2.permps"}
PERMUTE_BYTES = "llvm.x86.avx512.vpermi2var.qi.512"  # bytes from two registers of 64
CLAMP, CLAMP_LANES = "llvm.x86.avx512.mask.range.ps.512", 16
SMALLER_WITH_SIGN = 0b0010  # what CLAMP computes: the smaller magnitude, with the sign of the first operand
ALL_LANES, ROUND_AS_SET = -1, 4
# Beside this number floats are whole ones: a sum is rounded to the nearest, to even, and ends with its number's bits.
ROUNDER = 1.5 * 2**23
# By this share of the outermost cut, index moves the cuts to the right, so that rounding leaves a cut in its segment.
AT_CUT = 2.0**-21
BYTES = 64  # of such a register


class Segments(NamedTuple):
    """The numbers of one layer, float32: k - 1 cuts, k slopes, k biases."""

    cuts: Array
    slopes: Array
    biases: Array

    def forms(self, lanes: int) -> Iterator[Form]:
        """Those that compute this layer on vectors of up to so many lanes; without measuring, the first is best."""
        widths = np.diff(self.cuts.astype(np.float64))
        equal = len(widths) > 0 and bool(np.allclose(widths, widths.mean(), rtol=1e-4))
        if equal and lanes in PERMUTE and len(self.slopes) <= lanes:
            yield "index"
        left, right = (self.slopes[part] * self.cuts + self.biases[part] for part in (slice(-1), slice(1, None)))
        if np.allclose(left, right, rtol=1e-5, atol=1e-6):
            yield "sum"
        yield "select"

    @property
    def width(self) -> float:
        """That of the inner segments, on the average."""
        return float(self.cuts[-1].astype(np.float64) - self.cuts[0]) / (len(self.cuts) - 1)

    @property
    def middle(self) -> float:
        """Of segment k // 2, or a little more: seen from here, no cut of equal width rounds into the right segment."""
        lowest = float(self.cuts[0]) - self.width / 2
        return lowest + len(self.slopes) // 2 * self.width + AT_CUT * float(np.abs(self.cuts).max())

    @property
    def seen_from_middle(self) -> bool:
        """Whether the middle is 0, up to what keeps cuts in their segments."""
        return abs(self.middle) <= 2 * AT_CUT * float(np.abs(self.cuts).max())

    def shifted(self, origin: float) -> Segments:
        """The same function of x - origin."""
        cuts, biases = self.cuts - np.float64(origin), self.biases + self.slopes * np.float64(origin)
        return Segments(cuts.astype(np.float32), self.slopes, biases.astype(np.float32))

    def __call__(self, x: Array) -> Array:
        """The function itself, in float32."""
        segment = np.searchsorted(self.cuts, x, side="left")
        y: Array = self.slopes[segment] * x + self.biases[segment]
        return y


def lma(x: Any, form: Form, segments: Segments, lanes: int) -> Any:
    """A float32 value as TVM's expression; lanes: of a register."""
    numbers = [tirx.const(float(one), "float32") for one in np.concatenate(segments)]
    how = [tirx.const(FORMS.index(form), "int32"), tirx.const(lanes, "int32")]
    return tirx.call_intrin("float32", LMA, x, *how, *numbers)


def looked_up(code: Any, table: Array) -> Any:
    """An int8 code as TVM's expression; table: int8 [256], the entry of the code -128 first."""
    words = np.roll(table, 128).view(np.int32)  # the byte of the code 0 is 0
    numbers = [tirx.const(int(word), "int32") for word in words]
    return tirx.call_intrin("int8", TABLE, code, *numbers)


def _spelled_lma(call: Any) -> Any:
    x, form, width, *numbers = call.args
    values = np.array([_number(one) for one in numbers], np.float32)
    k = (len(values) + 1) // 3
    segments = Segments(*np.split(values, [k - 1, 2 * k - 1]))
    lanes, once = _lanes(x), tirx.Var("x", x.ty)
    if FORMS[_number(form)] == "index":
        register = lanes if lanes in PERMUTE and k <= lanes < _number(width) else _number(width)
        return _by_registers(x, register, lambda part: _index(part, segments, register))
    made = (_sum if FORMS[_number(form)] == "sum" else _select)(once, segments, lanes)
    return tirx.Let(once, x, made)


def _by_registers(x: Any, width: int, function: Callable[[Any], Any]) -> Any:
    """A function of whole registers, applied to a vector of any length."""
    lanes = _lanes(x)
    whole, once = -(-lanes // width) * width, tirx.Var("x", x.ty)
    copies = [once] * -(-whole // lanes)
    parts = []
    for start in range(0, whole, width):
        register = once if lanes == width else tirx.Shuffle(copies, list(range(start, start + width)))
        part = tirx.Var("part", register.ty)
        parts.append(tirx.Let(part, register, function(part)))
    return tirx.Let(once, x, parts[0] if lanes == width else tirx.Shuffle(parts, list(range(lanes))))


def _index(x: Any, segments: Segments, lanes: int) -> Any:
    """Seen from the middle, and from there only: x is moved unless the layer before has done it."""
    if segments.seen_from_middle:
        return _index_from_middle(x, segments, lanes)
    middle, moved = float(np.float32(segments.middle)), tirx.Var("moved", x.ty)
    return tirx.Let(moved, x - _filled(middle, lanes), _index_from_middle(moved, segments.shifted(middle), lanes))


def _index_from_middle(x: Any, segments: Segments, lanes: int) -> Any:
    """Beside a large number, x in units of the width is rounded to the number of its segment."""
    k, width = len(segments.slopes), segments.width
    bound = k // 2 * width
    if lanes == CLAMP_LANES and k < lanes:
        options = [(SMALLER_WITH_SIGN, "int32"), x, (ALL_LANES, "int16"), (ROUND_AS_SET, "int32")]
        how = [tirx.const(*one) if isinstance(one, tuple) else one for one in options]
        inside = tirx.call_llvm_pure_intrin(x.ty, CLAMP, x, _filled(bound, lanes), *how)
    else:
        inside = tirx.min(tirx.max(x, _filled(-bound, lanes)), _filled(bound - (1 - k % 2) * width, lanes))
    at = tirx.reinterpret(f"int32x{lanes}", inside * _filled(1 / width, lanes) + _filled(ROUNDER, lanes))
    return _picked(segments.slopes, at, lanes) * x + _picked(segments.biases, at, lanes)


def _sum(x: Any, segments: Segments, lanes: int) -> Any:
    steps = np.diff(segments.slopes.astype(np.float64))
    offset = float(segments.biases[0]) - float((steps * segments.cuts).sum())
    y = x * _filled(float(segments.slopes[0]), lanes) + _filled(offset, lanes)
    for cut, step in zip(segments.cuts, steps, strict=True):
        y = y + tirx.max(x, _filled(float(cut), lanes)) * _filled(float(step), lanes)
    return y


def _select(x: Any, segments: Segments, lanes: int) -> Any:
    slope, bias = (_filled(float(of[0]), lanes) for of in (segments.slopes, segments.biases))
    for cut, right_slope, right_bias in zip(segments.cuts, segments.slopes[1:], segments.biases[1:], strict=True):
        above = x > _filled(float(cut), lanes)
        slope = tirx.Select(above, _filled(float(right_slope), lanes), slope)
        bias = tirx.Select(above, _filled(float(right_bias), lanes), bias)
    return slope * x + bias


def _spelled_table(call: Any) -> Any:
    code, *numbers = call.args
    words = [_number(one) for one in numbers]
    registers = [
        tirx.reinterpret(f"int8x{BYTES}", _vector([tirx.const(word, "int32") for word in words[start:][: BYTES // 4]]))
        for start in range(0, len(words), BYTES // 4)
    ]
    return _by_registers(code, BYTES, lambda part: _entries(part, registers))


def _entries(at: Any, registers: list[Any]) -> Any:
    """The entries of 64 codes: two registers hold those from 0 on, two those of the others."""
    positive, negative = (
        tirx.call_llvm_pure_intrin(at.ty, PERMUTE_BYTES, first, at, second)
        for first, second in (registers[:2], registers[2:])
    )
    return tirx.Select(at < _filled(0, BYTES, "int8"), negative, positive)


def _picked(values: Array, at: Any, lanes: int) -> Any:
    """The value of every lane's segment; its number counts from the middle one, and only the last bits of it count."""
    numbers = (np.arange(lanes) + lanes // 2) % lanes - lanes // 2
    filled = values[np.clip(numbers + len(values) // 2, 0, len(values) - 1)]
    register = _vector([tirx.const(float(one), "float32") for one in filled])
    return tirx.call_llvm_pure_intrin(f"float32x{lanes}", PERMUTE[lanes], register, at)


def _vector(numbers: list[Any]) -> Any:
    return tirx.Shuffle(numbers, list(range(len(numbers))))


def _filled(value: float, lanes: int, kind: str = "float32") -> Any:
    number = tirx.const(value, kind)
    return tirx.Broadcast(number, lanes) if lanes > 1 else number


def _number(value: Any) -> Any:
    """Of an immediate, which a vector loop has broadcast."""
    return (value.value if isinstance(value, tirx.Broadcast) else value).value


def _lanes(value: Any) -> int:
    return int(tvm.DataType(str(value.ty)).lanes)


def _register(name: str, spelled: Callable[[Any], Any]) -> None:
    _ffi_api.RegisterOp(name, "")
    tvm.ir.register_op_attr(name, "TCallEffectKind", int(tirx.CallEffectKind.Pure.value))
    tvm.ir.register_op_attr(name, "TVectorizable", True)
    tirx.op.register_intrin_lowering(name, "default", f=spelled)


_register(LMA, _spelled_lma)
_register(TABLE, _spelled_table)
