"""Q/DQ graphs in integers: codes stay codes from one rounding to the next, and scales are applied to sums.

A dequantized value remembers the codes that it was made of. A convolution or matrix product of two such values is
summed in integers, and an LMA layer between two roundings is a table of 256 entries where the processor looks up bytes
in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tvm import relax, te, tirx

from edgekd.backends.tvm import products
from edgekd.backends.tvm.segments import ROUNDER, Segments, looked_up

if TYPE_CHECKING:
    from edgekd.backends.tvm.importer import Importer, Node

Array = npt.NDArray[Any]
# Dimensions of values that have their channels innermost, or can be had so: [N, D], images, volumes.
INNERMOST = (2, 4, 5)


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


def quantize(importer: Importer, node: Node) -> Any:
    """QuantizeLinear of an image, a volume or [N, D] with one constant scale; that of a constant is a constant."""
    array, scale, zero = (node.constant(index) for index in range(3))
    if scale is None or zero is None or scale.ndim > 1 or zero.dtype not in (np.int8, np.uint8):
        return None
    if array is not None:
        along = _along(node, scale, array.ndim)
        return relax.const(_rounded(array, scale.reshape(along), zero.reshape(along)), zero.dtype.name)
    given = node.inputs[0]
    if scale.size > 1 or given.ty.ndim not in INNERMOST:
        return None
    layer = importer.segmented.get(given)
    if layer and zero.dtype == np.int8 and importer.processor.looks_up_bytes:
        values = np.arange(-128, 128).astype(np.float32) * np.float32(layer.read.scale.item())
        table = _rounded(layer.segments(values), scale, zero)
        x, compute = layer.read.codes, _elementwise(lambda one: looked_up(one, table), products.LOOKED_UP)
    else:
        x, compute = given, _elementwise(_rounding(scale, zero), "codes")
    return importer.call(compute, importer.innermost(x), name="quantize")


def _rounded(array: Array, scale: Array, zero: Array) -> Array:
    limits = np.iinfo(zero.dtype)
    codes = np.rint(array / scale) + zero.astype(np.float32)
    return codes.clip(limits.min, limits.max).astype(zero.dtype)


def _rounding(scale: Array, zero: Array) -> Callable[[Any], Any]:
    """The code of a value, as TVM's expression: its last bits beside the rounder, which rounds before it is limited."""
    limits, offset = np.iinfo(zero.dtype), int(zero.item())
    factor, rounder = (tirx.const(float(value), "float32") for value in (np.float32(1) / scale.item(), ROUNDER))
    low, high = (tirx.const(ROUNDER + limit - offset, "float32") for limit in (limits.min, limits.max))
    bits = int(np.float32(ROUNDER).view(np.int32)) - offset

    def code(one: Any) -> Any:
        inside = te.max(te.min(one * factor + rounder, high), low)
        return (tirx.reinterpret("int32", inside) - tirx.const(bits, "int32")).astype(zero.dtype.name)

    return code


def _elementwise(function: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    return lambda x: te.compute(x.shape, lambda *at: function(x(*at)), name=name)


def dequantize(importer: Importer, node: Node) -> Any:
    """DequantizeLinear with a constant scale and the zero point 0; that of a constant is a constant."""
    array, scale, zero = (node.constant(index) for index in range(3))
    if scale is None or zero is None or scale.ndim > 1:
        return None
    signed = zero.dtype == np.int8 and not zero.any()
    if array is not None:
        along = _along(node, scale, array.ndim)
        value = (array.astype(np.int32) - zero.astype(np.int32).reshape(along)) * scale.reshape(along)
        made = relax.const(value.astype(np.float32), "float32")
        if signed:
            importer.codes[made] = Codes(array, scale.reshape(along))
        return made
    codes = node.inputs[0]
    if codes.ty.ndim not in INNERMOST or scale.size > 1:
        return None
    number = importer.bb.emit(relax.op.astype(importer.innermost(codes), "float32"))
    if zero.any():
        number = importer.bb.emit(relax.op.subtract(number, relax.const(float(zero.item()), "float32")))
    value = importer.outermost(relax.op.multiply(number, relax.const(float(scale.item()), "float32")))
    if signed:
        importer.codes[value] = Codes(codes, scale.reshape(-1))
    return value


def _along(node: Node, scale: Array, dimensions: int) -> list[int]:
    """The shape in which one scale, or one per entry of the node's axis, meets an array."""
    axis = int(node.attributes.get("axis", 1)) % max(dimensions, 1)
    return [-1 if scale.size > 1 and at == axis else 1 for at in range(dimensions)]


def per_channel(kernel: Codes, axis: int) -> Array | None:
    """The scales of weights by output channel, which is their axis; nothing when they are along another one."""
    scale = np.asarray(kernel.scale)
    along_others = scale.size > scale.shape[axis]
    return None if along_others else np.broadcast_to(scale.reshape(-1), (kernel.codes.shape[axis],))


def scaled_sums(importer: Importer, x: Codes, product: products.Product, scales: Array) -> Any:
    """The float result of a product of codes."""
    emit, packed = importer.bb.emit, relax.const(product.weights, product.weights.dtype.name)
    sums = importer.call(product.compute, importer.innermost(x.codes), packed, name=product.name)
    if product.offset_sums.any():
        sums = emit(relax.op.subtract(sums, importer.vector(product.offset_sums)))
    scale = (x.scale * scales).astype(np.float32)
    return emit(relax.op.multiply(emit(relax.op.astype(sums, "float32")), importer.vector(scale)))
