"""Q/DQ graphs in integers: codes stay codes from one rounding to the next, and scales are applied to sums.

A dequantized value remembers the codes that it was made of. A convolution or matrix product of two such values is
summed in integers, and an LMA layer between two roundings is a table of 256 entries where the processor looks up bytes
in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax, te, tirx

from edgekd.backends.tvm import products
from edgekd.backends.tvm.emitter import Codes, Emitter, Node
from edgekd.backends.tvm.segments import ROUNDER, looked_up

Array = npt.NDArray[Any]
# Dimensions of values that have their channels innermost, or can be had so: [N, D], images, volumes.
INNERMOST = (2, 4, 5)


def quantize(emitter: Emitter, node: Node) -> Any:
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
    layer = emitter.segmented.get(given)
    if layer and zero.dtype == np.int8 and emitter.processor.looks_up_bytes:
        values = np.arange(-128, 128).astype(np.float32) * np.float32(layer.read.scale.item())
        table = _rounded(layer.segments(values), scale, zero)
        x, compute = layer.read.codes, _elementwise(lambda one: looked_up(one, table), products.LOOKED_UP)
    else:
        x, compute = given, _elementwise(_rounding(scale, zero), "codes")
    return emitter.call(compute, emitter.innermost(x), name="quantize")


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


def dequantize(emitter: Emitter, node: Node) -> Any:
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
            emitter.codes[made] = Codes(array, scale.reshape(along))
        return made
    codes = node.inputs[0]
    if codes.ty.ndim not in INNERMOST or scale.size > 1:
        return None
    number = emitter.bb.emit(relax.op.astype(emitter.innermost(codes), "float32"))
    if zero.any():
        number = emitter.bb.emit(relax.op.subtract(number, relax.const(float(zero.item()), "float32")))
    value = emitter.outermost(relax.op.multiply(number, relax.const(float(scale.item()), "float32")))
    if signed:
        emitter.codes[value] = Codes(codes, scale.reshape(-1))
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


def scaled_sums(emitter: Emitter, x: Codes, product: products.Product, scales: Array) -> Any:
    """The float result of a product of codes."""
    emit, packed = emitter.bb.emit, relax.const(product.weights, product.weights.dtype.name)
    sums = emitter.call(product.compute, emitter.innermost(x.codes), packed, name=product.name)
    if product.offset_sums.any():
        sums = emit(relax.op.subtract(sums, emitter.vector(product.offset_sums)))
    scale = (x.scale * scales).astype(np.float32)
    return emit(relax.op.multiply(emit(relax.op.astype(sums, "float32")), emitter.vector(scale)))
