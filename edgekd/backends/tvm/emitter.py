"""Values while a model is converted: emitted with the channels last, and what is known of them beside their shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax
from tvm.ir.expr import GenericConst

from edgekd.backends.tvm import products
from edgekd.backends.tvm.processor import Processor
from edgekd.backends.tvm.segments import Form, Segments

Array = npt.NDArray[Any]

MAPS = (4, 5)  # dimensions of what has channels on a map: an image, a volume


@dataclass(frozen=True)
class Node:
    """An ONNX node while it is converted."""

    inputs: list[Any]  # Relax expressions; None where one is left out
    attributes: dict[str, Any]

    def constant(self, index: int) -> Array | None:
        """An input's value, if it is there and constant."""
        given = self.inputs[index] if index < len(self.inputs) else None
        return given.value.numpy() if isinstance(given, GenericConst) else None

    def integers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """An attribute that lists integers."""
        return tuple(int(one) for one in self.attributes.get(name, default))


@dataclass(frozen=True)
class Codes:
    """What a value is made of: int8 codes times the scale, which is one or one per output channel."""

    codes: Any  # a variable, or the array itself where it is constant
    scale: Array


@dataclass(frozen=True)
class Segmented:
    """An LMA layer that read codes."""

    read: Codes
    segments: Segments


class Emitter:
    """Emits what nodes are converted to.

    Every value is known by its variable in ONNX's layout. One that was computed with the channels last is transposed
    back for whoever does not ask for that; transposes that nobody reads are removed afterwards.
    """

    bb: Any  # the builder of TVM's importer

    def __init__(self, processor: Processor, form_of: Callable[[Segments], Form]) -> None:
        self.processor, self.form_of = processor, form_of
        self._channels_last: dict[Any, Any] = {}
        self.codes: dict[Any, Codes] = {}  # of values that were dequantized
        self.segmented: dict[Any, Segmented] = {}  # what LMA layers made of codes

    def operands(self, node: Node) -> list[Any]:
        """The inputs of an elementwise operator with the channels last; empty when it is not worth it, or cannot be."""
        ranks = {value.ty.ndim for value in node.inputs if self.has_channels_last(value)}
        if len(ranks) != 1:
            return []
        operands = [self._operand(value, *ranks) for value in node.inputs]
        return [] if None in operands else operands

    def _operand(self, value: Any, rank: int) -> Any:
        if isinstance(value, GenericConst):
            array = value.value.numpy()
            return self._constant(array, rank) if array.ndim <= rank else None
        return self.channels_last(value) if value is not None and value.ty.ndim == rank else None

    def _constant(self, array: Array, rank: int) -> Any:
        """A constant that is broadcast to [N, C, H, W], so that it broadcasts to [N, H, W, C]."""
        if array.size == 1:
            return relax.const(array.reshape(()), array.dtype.name)  # one number becomes a part of the loop
        last = array.reshape((1,) * (rank - array.ndim) + array.shape).transpose(to_channels_last(rank))
        return relax.const(np.ascontiguousarray(last), array.dtype.name)

    def has_channels_last(self, value: Any) -> bool:
        """Whether a value is at hand with the channels last."""
        return isinstance(value, relax.Var) and value in self._channels_last

    def channels_last(self, value: Any) -> Any:
        """A value [N, C, H, W] as [N, H, W, C]."""
        if value not in self._channels_last:
            self._channels_last[value] = self.bb.emit(relax.op.permute_dims(value, to_channels_last(value.ty.ndim)))
        return self._channels_last[value]

    def back(self, value: Any) -> Any:
        """A value [N, H, W, C] as [N, C, H, W], by which it is known from here on."""
        if not isinstance(value, relax.Var):  # a second name of a value would keep it from being fused
            value = self.bb.emit(value)
        first = self.bb.emit(relax.op.permute_dims(value, to_channels_first(value.ty.ndim)))
        self._channels_last[first] = value
        return first

    def innermost(self, value: Any) -> Any:
        """A value as loops read it: an image with the channels last, another one as it is."""
        return self.channels_last(value) if value.ty.ndim in MAPS else value

    def outermost(self, value: Any) -> Any:
        """The reverse of `innermost`, for what was just made."""
        made = value if isinstance(value, relax.Var) else self.bb.emit(value)
        return self.back(made) if made.ty.ndim in MAPS else made

    def product(self, product: products.Product, x: Any) -> Any:
        """Emit a product of an input with packed weights."""
        packed = relax.const(product.weights, product.weights.dtype.name)
        return self.call(product.compute, self.innermost(x), packed, name=product.name)

    def call(self, compute: Callable[..., Any], *args: Any, name: str) -> Any:
        """Emit a loop nest that is given as a tensor expression."""
        return self.bb.emit_te(compute, *args, primfunc_name_hint=name)

    def vector(self, values: Array) -> Any:
        """A constant [C] that broadcasts along the last dimension."""
        return relax.const(np.ascontiguousarray(values.reshape(-1)), values.dtype.name)


def to_channels_last(rank: int) -> list[int]:
    """The axes of [N, C, ...] in the order of [N, ..., C]."""
    return [0, *range(2, rank), 1]


def to_channels_first(rank: int) -> list[int]:
    """The reverse."""
    return [0, rank - 1, *range(1, rank - 1)]
