"""Convolutions and matrix products as loop nests over packed weights.

The weights are stored as the innermost loops read them: a vector of output channels for every input value, so that one
input value is multiplied into a whole vector. The number of output channels is rounded up to whole vectors inside the
loops only; what goes out has the size that ONNX means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tvm import te, tirx, topi

from edgekd.backends.tvm.dot import Dot
from edgekd.backends.tvm.processor import Processor

Array = npt.NDArray[Any]

# Names of blocks, by which the schedules find them.
PRODUCT, DEPTHWISE, PADDED, INTEGER_PRODUCT = "product", "depthwise", "padded", "integer_product"
LOOKED_UP = "looked_up"  # codes that were looked up in a table
INTEGER = "integer"  # a part of the name of every kernel that sums products of codes
QUAD = 4  # neighbouring codes that one instruction multiplies and adds


class Window(NamedTuple):
    """How a kernel moves over an image or a volume: pads are those before every axis, then those behind."""

    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]

    @property
    def before(self) -> tuple[int, ...]:
        """Zeros in front of every axis."""
        return self.pads[: len(self.strides)]

    @property
    def after(self) -> tuple[int, ...]:
        """Zeros behind every axis."""
        return self.pads[len(self.strides) :]

    def read(self, place: Sequence[Any], taps: Sequence[Any]) -> list[Any]:
        """Where a tap of the kernel reads for the output at a place."""
        steps = zip(place, taps, self.strides, self.dilations, strict=True)
        return [at * stride + tap * dilation for at, tap, stride, dilation in steps]

    def sizes(self, image: Any, kernel: Sequence[int]) -> list[Any]:
        """Of the output, for an image that is padded already, channels last."""
        steps = zip(image.shape[1:-1], kernel, self.strides, self.dilations, strict=True)
        return [(size - (taps - 1) * dilation - 1) // stride + 1 for size, taps, stride, dilation in steps]


NOWHERE = Window((), (), ())  # of a product without a kernel


@dataclass(frozen=True)
class Product:
    """Packed weights, and what to compute of an input and them."""

    name: str
    weights: Array
    compute: Callable[[Any, Any], Any]
    offset_sums: Array = field(default_factory=lambda: np.zeros(1, np.int32))  # too much in each channel's sum


def convolution(weights: Array, groups: int, window: Window, processor: Processor) -> Product:
    """A convolution of [N, H, W, C], or [N, D, H, W, C], with weights [O, C / groups, *kernel]."""
    channels = weights.shape[0]
    if groups == channels and weights.shape[1] == 1:
        return _depthwise(weights, window)
    width = vector_width(channels, groups, processor.lanes)
    per_group = channels // groups
    packed = pack(_outputs_last(weights), width)  # [blocks, *kernel, in, vector]
    _, *kernel, depth, _ = packed.shape

    def compute(x: Any, packed: Any) -> Any:
        image = padded(x, window)
        taps, inner = _taps(kernel), te.reduce_axis((0, depth), "ci")

        def value(b: Any, *at: Any) -> Any:
            *place, c = at
            group = c // per_group * depth if groups > 1 else 0
            pixel = image[b, *window.read(place, taps), group + inner]
            return te.sum(pixel * packed[c // width, *taps, inner, c % width], axis=[*taps, inner])

        shape = (image.shape[0], *window.sizes(image, kernel), packed.shape[0] * width)
        return _cropped(te.compute(shape, value, name=PRODUCT), channels)

    return Product("convolution", packed, compute)


def dense(matrix: Array, processor: Processor) -> Product:
    """The product of [N, D] with a matrix [D, O]."""
    channels = matrix.shape[1]
    width = vector_width(channels, 1, processor.lanes)
    packed = pack(matrix, width)  # [blocks, D, vector]

    def compute(x: Any, packed: Any) -> Any:
        inner = te.reduce_axis((0, packed.shape[1]), "ci")
        whole = te.compute(
            (x.shape[0], packed.shape[0] * width),
            lambda b, c: te.sum(x[b, inner] * packed[c // width, inner, c % width], axis=[inner]),
            name=PRODUCT,
        )
        return _cropped(whole, channels)

    return Product("dense", packed, compute)


def integer_convolution(weights: Array, groups: int, window: Window, dot: Dot) -> Product:
    """The INT32 sums of a convolution of codes [N, H, W, C], or [N, D, H, W, C], with codes [O, C / groups, *kernel].

    A depthwise one is summed in float32, which is as exact: no instruction adds products of one channel alone.
    """
    if groups == len(weights) and weights.shape[1] == 1:
        return _depthwise(weights, window)
    weights, groups = _filling_vectors(weights, groups, dot.lanes)
    channels = len(weights)
    packed = _packed_quads(_outputs_last(weights), dot)  # [blocks, *kernel, in / 4, vector, 4]
    _, *kernel, quads, _, _ = packed.shape

    def compute(x: Any, packed: Any) -> Any:
        image = _codes(x, window, groups, dot.offset)
        taps, inner, quad = _taps(kernel), te.reduce_axis((0, quads), "ci"), te.reduce_axis((0, QUAD), "quad")

        def value(b: Any, *at: Any) -> Any:
            *place, c = at
            group = c // (channels // groups) * quads * QUAD if groups > 1 else 0
            code = image[b, *window.read(place, taps), group + inner * QUAD + quad]
            weight = packed[c // dot.lanes, *taps, inner, c % dot.lanes, quad]
            return te.sum(code.astype("int32") * weight.astype("int32"), axis=[*taps, inner, quad])

        shape = (x.shape[0], *window.sizes(image, kernel), packed.shape[0] * dot.lanes)
        return _cropped(te.compute(shape, value, name=INTEGER_PRODUCT), channels)

    return Product(f"{INTEGER}_convolution", packed, compute, _offset_sums(weights.reshape(channels, -1), dot))


def integer_dense(matrix: Array, dot: Dot) -> Product:
    """The INT32 sums of the product of codes [N, D] with codes [D, O]."""
    packed = _packed_quads(matrix, dot)  # [blocks, D / 4, vector, 4]

    def compute(x: Any, packed: Any) -> Any:
        row = _codes(x, NOWHERE, 1, dot.offset)
        inner, quad = te.reduce_axis((0, packed.shape[1]), "ci"), te.reduce_axis((0, QUAD), "quad")

        def value(b: Any, c: Any) -> Any:
            weight = packed[c // dot.lanes, inner, c % dot.lanes, quad]
            return te.sum(row[b, inner * QUAD + quad].astype("int32") * weight.astype("int32"), axis=[inner, quad])

        whole = te.compute((x.shape[0], packed.shape[0] * dot.lanes), value, name=INTEGER_PRODUCT)
        return _cropped(whole, matrix.shape[1])

    return Product(f"{INTEGER}_dense", packed, compute, _offset_sums(matrix.T, dot))


def _filling_vectors(weights: Array, groups: int, lanes: int) -> tuple[Array, int]:
    """The same convolution in as many groups as fill whole vectors, zeros between what does not belong together."""
    per_group = len(weights) // groups
    merged = next((m for m in range(1, groups) if groups % m == 0 and m * per_group % lanes == 0), groups)
    depth = weights.shape[1]
    wide = np.zeros((len(weights), merged * depth, *weights.shape[2:]), weights.dtype)
    for group in range(groups):
        outputs, start = slice(group * per_group, (group + 1) * per_group), group % merged * depth
        wide[outputs, start : start + depth] = weights[outputs]
    return wide, groups // merged


def _packed_quads(weights: Array, dot: Dot) -> Array:
    """int8 [..., C, O] to [O in whole vectors, ..., C / 4, vector, 4]."""
    *before, depth, channels = weights.shape
    quads = -(-depth // QUAD)
    filled = np.zeros((*before, quads * QUAD, channels), np.int8)
    filled[..., :depth, :] = weights
    packed = pack(filled, dot.lanes)
    return np.ascontiguousarray(packed.reshape(-1, *before, quads, QUAD, dot.lanes).swapaxes(-1, -2))


def _offset_sums(weights: Array, dot: Dot) -> Array:
    """What the offset of the activations' codes adds to each channel's sum: [O, ...] to int32 [O]."""
    sums: Array = weights.sum(axis=1, dtype=np.int32) * np.int32(dot.offset)
    return sums


def _codes(x: Any, window: Window, groups: int, offset: int) -> Any:
    """int8 [N, ..., C] with zeros around the image and behind each group's channels, all moved by the offset."""
    before, after = ((0, *pads, 0) for pads in (window.before, window.after))
    *sizes, channels = (int(size) if isinstance(size, tirx.IntImm) else size for size in x.shape)
    depth, kind = channels // groups, "uint8" if offset else "int8"
    filled = -(-depth // QUAD) * QUAD

    def value(*at: Any) -> Any:
        outer = list(zip(at, before, sizes, strict=False))
        inside = [one >= low for one, low, _ in outer[1:]] + [one < size + low for one, low, size in outer[1:]]
        places = [one - low for one, low, _ in outer]
        within = at[-1] % filled
        code = x(*places, at[-1] // filled * depth + within if groups > 1 else at[-1])
        moved = (code.astype("int16") + tirx.const(offset, "int16")).astype(kind)
        return tirx.if_then_else(tirx.all(*inside, within < depth), moved, tirx.const(offset, kind))

    shape = [low + size + high for low, size, high in zip(before, sizes, after, strict=False)]
    return te.compute((*shape, groups * filled), value, name=PADDED)


def _depthwise(weights: Array, window: Window) -> Product:
    """Every channel with a kernel of its own; the vector goes along the channels of the input."""
    channels, _, *kernel = weights.shape

    def compute(x: Any, packed: Any) -> Any:
        image, taps = padded(x if x.dtype == "float32" else topi.cast(x, "float32"), window), _taps(kernel)

        def value(b: Any, *at: Any) -> Any:
            *place, c = at
            return te.sum(image[b, *window.read(place, taps), c] * packed[*taps, c], axis=taps)

        return te.compute((image.shape[0], *window.sizes(image, kernel), channels), value, name=DEPTHWISE)

    name = "depthwise" if weights.dtype == np.float32 else f"{INTEGER}_depthwise"
    return Product(name, np.ascontiguousarray(np.moveaxis(weights[:, 0], 0, -1).astype(np.float32)), compute)


def _outputs_last(weights: Array) -> Array:
    """[O, C, *kernel] as [*kernel, C, O]."""
    return np.moveaxis(weights, (0, 1), (-1, -2))


def _taps(kernel: Sequence[int]) -> list[Any]:
    """What the sums over a kernel run along."""
    return [te.reduce_axis((0, size), f"k{axis}") for axis, size in enumerate(kernel)]


def vector_width(channels: int, groups: int, lanes: int) -> int:
    """How many output channels one vector holds: all of one group, and no more than half of the last one empty."""
    if groups > 1:
        return max(width for width in range(1, lanes + 1) if channels // groups % width == 0)
    while lanes > 1 and lanes >= 2 * channels:
        lanes //= 2
    return lanes


def pack(weights: Array, width: int) -> Array:
    """[..., O] to [O in whole vectors, ..., vector], zeros where there are no more channels."""
    channels = weights.shape[-1]
    blocks = -(-channels // width)
    filled = np.zeros((*weights.shape[:-1], blocks * width), weights.dtype)
    filled[..., :channels] = weights
    return np.ascontiguousarray(np.moveaxis(filled.reshape(*weights.shape[:-1], blocks, width), -2, 0))


def padded(x: Any, window: Window) -> Any:
    """[N, ..., C] with zeros around the image."""
    if not any(window.pads):
        return x
    before, after = ([0, *pads, 0] for pads in (window.before, window.after))
    return topi.nn.pad(x, before, after, tirx.const(0, x.dtype), name=PADDED)


def _cropped(whole: Any, channels: int) -> Any:
    """Without the channels that only fill the last vector."""
    if int(whole.shape[-1]) == channels:
        return whole
    return te.compute((*whole.shape[:-1], channels), lambda *at: whole(*at), name="cropped")
