"""Convolutions as ONNX means them, plain and transposed, as products with packed weights: of codes in integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax, te, tirx

from edgekd.backends.tvm import products
from edgekd.backends.tvm.emitter import Emitter, Node
from edgekd.backends.tvm.quantized import per_channel, scaled_sums

Array = npt.NDArray[Any]


def convolution(emitter: Emitter, node: Node) -> Any:
    """Conv in two or three dimensions with constant weights, and its bias."""
    weights = node.constant(1)
    window = window_of(node, weights.shape[2:]) if _is_convolution(node, weights) and weights is not None else None
    if window is None:
        return None
    return _with_bias(emitter, node, _sums(emitter, node, window, lambda weights: weights, axis=0))


def transposed_convolution(emitter: Emitter, node: Node) -> Any:
    """ConvTranspose as a convolution of stride 1 whose outputs are the pixels between two steps of the stride.

    An output at q * stride + phase reads the inputs q, q - 1, ... with the taps phase, phase + stride, ...: each phase
    is a set of channels of its own, and the channels are then moved to their places (W. Shi et al., "Is the
    deconvolution layer the same as a convolutional layer?", 2016).
    """
    weights, window = node.constant(1), None
    if _is_convolution(node, weights) and weights is not None and "output_shape" not in node.attributes:
        window = window_of(node, weights.shape[2:])
    inside = list(node.inputs[0].ty.shape)[2:]
    if weights is None or window is None or set(window.dilations) != {1} or not _fixed(inside):
        return None
    steps, groups = window.strides, int(node.attributes.get("group", 1))
    taps = [-(-size // step) for size, step in zip(weights.shape[2:], steps, strict=True)]
    extra = node.integers("output_padding", (0,) * len(steps))
    sizes = [
        (int(size) - 1) * step - before - after + kernel + more
        for size, step, before, after, kernel, more in zip(
            inside, steps, window.before, window.after, weights.shape[2:], extra, strict=True
        )
    ]
    # How many positions of the kernel reach into the output; what they read beyond the image is zero.
    reach = [-(-(size + before) // step) for size, before, step in zip(sizes, window.before, steps, strict=True)]
    after = [max(0, many - int(size)) for many, size in zip(reach, inside, strict=True)]
    ones = (1,) * len(steps)
    sliding = products.Window(ones, ones, (*(count - 1 for count in taps), *after))
    made = _sums(emitter, node, sliding, lambda weights: phases(weights, groups, steps, taps), axis=1)
    per_group = weights.shape[1]

    def compute(x: Any) -> Any:
        def value(b: Any, *at: Any) -> Any:
            *place, c = at
            moved = [one + before for one, before in zip(place, window.before, strict=True)]
            phase: Any = 0
            for one, step in zip(moved, steps, strict=True):
                phase = phase * step + one % step
            channel = (c // per_group * int(np.prod(steps)) + phase) * per_group + c % per_group
            return x(b, *(one // step for one, step in zip(moved, steps, strict=True)), channel)

        return te.compute((x.shape[0], *sizes, groups * per_group), value, name="moved")

    return _with_bias(emitter, node, emitter.call(compute, made, name="moved"))


def phases(weights: Array, groups: int, steps: Sequence[int], taps: Sequence[int]) -> Array:
    """Weights [C, O / groups, *kernel] of a transposed convolution as those of a plain one, [groups * phases *
    O / groups, C / groups, *taps]."""
    inputs, outputs, *kernel = weights.shape
    missing = [count * step - size for count, step, size in zip(taps, steps, kernel, strict=True)]
    filled = np.pad(weights, [(0, 0), (0, 0), *((0, more) for more in missing)])
    split = [size for pair in zip(taps, steps, strict=True) for size in pair]
    parts = filled.reshape(groups, inputs // groups, outputs, *split)
    tap_axes, step_axes = range(3, parts.ndim, 2), range(4, parts.ndim, 2)
    parts = np.flip(parts, tuple(tap_axes)).transpose(0, *step_axes, 2, 1, *tap_axes)
    return np.ascontiguousarray(parts.reshape(-1, inputs // groups, *taps))


def window_of(node: Node, kernel: tuple[int, ...]) -> products.Window | None:
    """How the kernel moves over the image; nothing where ONNX asks for what is not made here."""
    if node.attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    ones, pads = (1,) * len(kernel), node.integers("pads", (0,) * 2 * len(kernel))
    return products.Window(node.integers("strides", ones), node.integers("dilations", ones), pads)


def _is_convolution(node: Node, weights: Array | None) -> bool:
    """Whether it is over an image or a volume, with constant weights, and a constant bias if any."""
    return weights is not None and weights.ndim in (4, 5) and (node.constant(2) is None) == (len(node.inputs) < 3)


def _fixed(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, (int, tirx.IntImm)) for size in sizes)


def _sums(emitter: Emitter, node: Node, window: products.Window, arranged: Callable[[Array], Array], axis: int) -> Any:
    """The products of a convolution without its bias, channels last; in integers where codes meet codes.

    arranged: its weights as [O, C / groups, *kernel]. axis: of their output channels before that.
    """
    groups, processor = int(node.attributes.get("group", 1)), emitter.processor
    x, kernel = emitter.codes.get(node.inputs[0]), emitter.codes.get(node.inputs[1])
    scales = per_channel(kernel, axis) if x and kernel and processor.dot else None
    if x and kernel and processor.dot and scales is not None:
        codes = arranged(kernel.codes)
        product = products.integer_convolution(codes, groups, window, processor.dot)
        return scaled_sums(emitter, x, product, np.resize(scales, len(codes)))
    weights = node.constant(1)
    assert weights is not None
    return emitter.product(products.convolution(arranged(weights), groups, window, processor), node.inputs[0])


def _with_bias(emitter: Emitter, node: Node, made: Any) -> Any:
    bias = node.constant(2)
    return made if bias is None else emitter.bb.emit(relax.op.add(made, emitter.vector(bias)))
