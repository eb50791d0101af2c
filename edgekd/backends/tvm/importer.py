"""From ONNX to Relax with the channels last: what the schedules of `schedules.py` compute fast.

TVM's own importer keeps ONNX's layout [N, C, H, W], in which a vector over the channels would be gathered from memory.
Here convolutions, pools and what stands between them work on [N, H, W, C], or [N, D, H, W, C], and weights are packed
while they are constants. Operators that are not listed here are TVM's own, on the layout that ONNX means.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
import tvm
from tvm import relax, te, tirx, topi
from tvm.ir.expr import GenericConst
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

from edgekd.backends.tvm import products
from edgekd.backends.tvm.convolutions import convolution, transposed_convolution, window_of
from edgekd.backends.tvm.emitter import MAPS, Emitter, Node, Segmented, to_channels_last
from edgekd.backends.tvm.origins import move_origins
from edgekd.backends.tvm.processor import Processor
from edgekd.backends.tvm.quantized import dequantize, per_channel, quantize, scaled_sums
from edgekd.backends.tvm.segments import Form, Segments
from edgekd.backends.tvm.segments import lma as segments_of
from edgekd.quantize.graph import LMA_DOMAIN

Array = npt.NDArray[Any]

ELEMENTWISE = {
    "Abs", "Add", "And", "Cast", "Ceil", "Div", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual", "Log", "Mul", "Neg",
    "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Softplus", "Sqrt", "Sub", "Tanh",
}  # fmt: skip


def import_model(path: Path, processor: Processor, form_of: Callable[[Segments], Form]) -> tvm.IRModule:
    """The model as a Relax module with one function `main`; form_of: how an LMA layer with these segments is computed.

    Raises tvm.error.OpNotImplemented, which names the operators that TVM does not know.
    """
    model = onnx.inliner.inline_selected_functions(onnx.load(path), [(LMA_DOMAIN, "LMA")], exclude=True)
    del model.graph.output[1:]  # as with the other runtimes, the logits are the first output
    move_origins(model.graph, processor.lanes)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return Importer(processor, form_of).from_onnx(model.graph, opset)


class Importer(Emitter, ONNXGraphImporter):  # type: ignore[misc]
    """TVM's importer, but with the channels last where it matters."""

    def __init__(self, processor: Processor, form_of: Callable[[Segments], Form]) -> None:
        ONNXGraphImporter.__init__(self, {}, "float32", sanitize=False)
        Emitter.__init__(self, processor, form_of)

    def _check_for_unsupported_ops(self, graph: Any) -> None:
        known = onnx.GraphProto()
        known.node.extend(node for node in graph.node if node.op_type not in CONVERTERS)
        super()._check_for_unsupported_ops(known)

    def _convert_operator(self, op_name: str, inputs: list[Any], attrs: dict[str, Any], opset: int) -> Any:
        node = Node(list(inputs), attrs)
        if convert := CONVERTERS.get(op_name):
            made = convert(self, node)
        elif op_name in ELEMENTWISE and (operands := self.operands(node)):
            made = super()._convert_operator(op_name, operands, attrs, opset)
        else:
            made = None
        if made is None:
            return super()._convert_operator(op_name, inputs, attrs, opset)
        plain = made.ty.ndim not in MAPS or self.has_channels_last(made) or isinstance(made, GenericConst)
        return made if plain else self.back(made)


def with_channels_last(axis: int, rank: int) -> int:
    """Where an axis of ONNX's layout stands with the channels last."""
    return to_channels_last(rank).index(axis % rank)


def dense(emitter: Emitter, node: Node) -> Any:
    """MatMul or Gemm of [N, D] with a constant matrix, and its bias."""
    matrix, bias = node.constant(1), node.constant(2)
    attributes, processor = node.attributes, emitter.processor
    plain = all(attributes.get(name, 1.0) == 1.0 for name in ("alpha", "beta")) and not attributes.get("transA")
    if matrix is None or matrix.ndim != 2 or not plain or node.inputs[0].ty.ndim != 2:
        return None
    if (bias is None) != (len(node.inputs) < 3) or (bias is not None and bias.size not in (1, bias.shape[-1])):
        return None
    transposed = bool(attributes.get("transB"))
    x, kernel = emitter.codes.get(node.inputs[0]), emitter.codes.get(node.inputs[1])
    scales = per_channel(kernel, 0 if transposed else 1) if x and kernel and processor.dot else None
    if x and kernel and processor.dot and scales is not None:
        product = products.integer_dense(kernel.codes.T if transposed else kernel.codes, processor.dot)
        made = scaled_sums(emitter, x, product, scales)
    else:
        made = emitter.product(products.dense(matrix.T if transposed else matrix, processor), node.inputs[0])
    return made if bias is None else emitter.bb.emit(relax.op.add(made, emitter.vector(bias)))


def pool(kind: str) -> Callable[[Emitter, Node], Any]:
    """MaxPool or AveragePool of an image or a volume."""

    def convert(emitter: Emitter, node: Node) -> Any:
        kernel = node.integers("kernel_shape", ())
        window = window_of(node, kernel)
        if window is None or len(kernel) + 2 not in MAPS:
            return None
        pooled, layout = (topi.nn.pool2d, "NHWC") if len(kernel) == 2 else (topi.nn.pool3d, "NDHWC")
        count_padding = bool(node.attributes.get("count_include_pad", 0))
        ceil = bool(node.attributes.get("ceil_mode", 0))

        def compute(x: Any) -> Any:
            return pooled(x, kernel, window.strides, window.dilations, window.pads, kind, ceil, layout, count_padding)

        return emitter.call(compute, emitter.channels_last(node.inputs[0]), name=f"{kind}_pool")

    return convert


def global_average_pool(emitter: Emitter, node: Node) -> Any:
    """GlobalAveragePool of [N, C, H, W]."""
    return mean_of_map(emitter, node.inputs[0], keep=True) if node.inputs[0].ty.ndim in MAPS else None


def mean_of_map(emitter: Emitter, x: Any, *, keep: bool) -> Any:
    """The mean of every channel; keep: with axes of length 1."""
    axes = list(range(1, x.ty.ndim - 1))
    return emitter.bb.emit(relax.op.mean(emitter.channels_last(x), axis=axes, keepdims=keep))


def reduce_mean(emitter: Emitter, node: Node) -> Any:
    """ReduceMean over the image."""
    x = node.inputs[0]
    axes = node.constant(1) if len(node.inputs) > 1 else np.asarray(node.integers("axes", ()))
    rank = x.ty.ndim
    if axes is None or rank not in MAPS or sorted(int(axis) % rank for axis in axes.reshape(-1)) != [*range(2, rank)]:
        return None
    return mean_of_map(emitter, x, keep=bool(node.attributes.get("keepdims", 1)))


def flatten(emitter: Emitter, node: Node) -> Any:
    """Flatten or Reshape of [N, C, 1, 1] to [N, C]: nothing is moved."""
    x = node.inputs[0]
    if not emitter.has_channels_last(x) or any(int(size) != 1 for size in list(x.ty.shape)[2:]):
        return None
    shape = node.constant(1) if len(node.inputs) > 1 else np.asarray([0, -1])
    channels = int(x.ty.shape[1])
    if shape is None or shape.size != 2 or int(shape[1]) not in (-1, channels):
        return None
    return emitter.bb.emit(relax.op.squeeze(emitter.channels_last(x), axis=list(range(1, x.ty.ndim - 1))))


def lma(emitter: Emitter, node: Node) -> Any:
    """edgekd.LMA: its segments are numbers in the loop. What reads codes is remembered, for a table."""
    numbers = [node.constant(index) for index in (1, 2, 3)]
    if any(array is None for array in numbers):
        return None
    segments = Segments(*(np.asarray(array, np.float32).reshape(-1) for array in numbers))
    form, lanes = emitter.form_of(segments), emitter.processor.lanes

    def compute(x: Any) -> Any:
        return te.compute(x.shape, lambda *at: segments_of(x(*at), form, segments, lanes), name="lma")

    made = emitter.outermost(emitter.call(compute, emitter.innermost(node.inputs[0]), name="lma"))
    if read := emitter.codes.get(node.inputs[0]):
        emitter.segmented[made] = Segmented(read, segments)
    return made


def batch_normalization(emitter: Emitter, node: Node) -> Any:
    """BatchNormalization of [N, C, H, W] as one multiplication and one addition."""
    numbers = [node.constant(index) for index in range(1, 5)]
    if any(array is None for array in numbers) or node.inputs[0].ty.ndim not in MAPS:
        return None
    gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in numbers)
    scale = gamma / np.sqrt(variance + float(node.attributes.get("epsilon", 1e-5)))
    slope, offset = (emitter.vector(array.astype(np.float32)) for array in (scale, beta - mean * scale))
    scaled = emitter.bb.emit(relax.op.multiply(emitter.channels_last(node.inputs[0]), slope))
    return emitter.bb.emit(relax.op.add(scaled, offset))


def clip(emitter: Emitter, node: Node) -> Any:
    """Clip with constant limits. TVM's own also keeps track of NaN, at the price of two more comparisons."""
    operands = emitter.operands(Node(node.inputs[:1], {}))
    limits = [node.constant(index) for index in (1, 2)]
    given = [value is not None for value in [*node.inputs[1:3], None, None][:2]]
    if not operands or given != [limit is not None for limit in limits]:
        return None
    (x,) = operands
    for limit, op in zip(limits, (relax.op.maximum, relax.op.minimum), strict=True):
        if limit is not None:
            x = emitter.bb.emit(op(x, relax.const(limit.reshape(()), limit.dtype.name)))
    return x


def extreme(op: Callable[[Any, Any], Any]) -> Callable[[Emitter, Node], Any]:
    """Max or Min of several values."""

    def convert(emitter: Emitter, node: Node) -> Any:
        operands = emitter.operands(node)
        if not operands:
            return None
        made, *others = operands
        for other in others:
            made = emitter.bb.emit(op(made, other))
        return made

    return convert


def where(emitter: Emitter, node: Node) -> Any:
    """Where, with numbers as a part of the loop: so an LMA is picked by comparisons, without a look at memory."""
    operands = emitter.operands(node)
    if not operands or isinstance(operands[0], GenericConst):
        return None
    numbers = [one.value.numpy() if isinstance(one, GenericConst) else None for one in operands]
    tensors = [one for one, number in zip(operands, numbers, strict=True) if number is None or number.size > 1]
    if len({str(one.ty.shape) for one in tensors}) > 1:
        return None

    def compute(*given: Any) -> Any:
        remaining = iter(given)
        parts = [
            next(remaining) if number is None else tirx.const(number.item(), number.dtype.name) for number in numbers
        ]
        shape = given[0].shape
        chosen = [lambda *at, part=part: part(*at) if isinstance(part, te.Tensor) else part for part in parts]
        return te.compute(shape, lambda *at: tirx.Select(*(value(*at) for value in chosen)), name="chosen")

    return emitter.call(compute, *tensors, name="where")


def prelu(emitter: Emitter, node: Node) -> Any:
    """PRelu with constant slopes."""
    operands = emitter.operands(node)
    if not operands or node.constant(1) is None:
        return None
    (x, slope), zero = operands, relax.const(0.0)
    below = emitter.bb.emit(relax.op.multiply(emitter.bb.emit(relax.op.minimum(x, zero)), slope))
    return emitter.bb.emit(relax.op.add(emitter.bb.emit(relax.op.maximum(x, zero)), below))


def pad(emitter: Emitter, node: Node) -> Any:
    """Pad of [N, C, H, W] with a constant."""
    pads, value, rank = node.constant(1), node.constant(2), node.inputs[0].ty.ndim
    constant = node.attributes.get("mode", b"constant") == b"constant" and rank in MAPS
    if pads is None or pads.size != 2 * rank or not constant or (len(node.inputs) > 3 and node.inputs[3] is not None):
        return None
    before, after = ([int(half[axis]) for axis in to_channels_last(rank)] for half in (pads[:rank], pads[rank:]))
    filled = 0.0 if value is None else float(value.reshape(()))

    def compute(x: Any) -> Any:
        return topi.nn.pad(x, before, after, filled, name="padded")

    return emitter.call(compute, emitter.channels_last(node.inputs[0]), name="pad")


def strided_slice(emitter: Emitter, node: Node) -> Any:
    """Slice of [N, C, H, W] with constant limits along C, H and W."""
    parts = [node.constant(index) for index in range(1, len(node.inputs))]
    x = node.inputs[0]
    if not emitter.has_channels_last(x) or len(parts) < 3 or any(part is None for part in parts):
        return None
    starts, ends, axes, *steps = ([int(one) for one in np.asarray(part).reshape(-1)] for part in parts)
    stride = steps[0] if steps else [1] * len(axes)
    rank = x.ty.ndim
    if any(axis % rank == 0 for axis in axes) or min(stride) < 1:
        return None
    where = [with_channels_last(axis, rank) for axis in axes]
    sizes = [int(x.ty.shape[axis % rank]) for axis in axes]
    ends = [min(end, size) for end, size in zip(ends, sizes, strict=True)]
    return emitter.bb.emit(relax.op.strided_slice(emitter.channels_last(x), where, starts, ends, stride))


def concat(emitter: Emitter, node: Node) -> Any:
    """Concat of values [N, C, H, W]."""
    operands = emitter.operands(node)
    if not operands:
        return None
    axis = with_channels_last(int(node.attributes["axis"]), operands[0].ty.ndim)
    return emitter.bb.emit(relax.op.concat(operands, axis))


def resize(emitter: Emitter, node: Node) -> Any:
    """Resize by nearest neighbours: which pixel stands where is known now. TVM's own takes others in some modes."""
    x, scales, known = node.inputs[0], node.constant(2), ("mode", "coordinate_transformation_mode", "nearest_mode")
    mode, coordinates, rounding = (
        node.attributes.get(name, default).decode()
        for name, default in zip(known, (b"nearest", b"half_pixel", b"round_prefer_floor"), strict=True)
    )
    if x.ty.ndim not in MAPS or scales is None or scales.size != x.ty.ndim or "axes" in node.attributes:
        return None
    if mode != "nearest" or coordinates not in ("asymmetric", "half_pixel") or not (scales[:2] == 1).all():
        return None
    sizes = [int(size) for size in list(x.ty.shape)[2:]]
    read = [_nearest(size, by, coordinates, rounding) for size, by in zip(sizes, scales[2:], strict=True)]

    def compute(x: Any, *tables: Any) -> Any:
        shape = (x.shape[0], *map(len, read), x.shape[-1])

        def value(b: Any, *at: Any) -> Any:
            *place, c = at
            found = iter(tables)
            pixel = [one // by if by else next(found)[one] for one, by in zip(place, repeats, strict=True)]
            return x(b, *pixel, c)

        return te.compute(shape, value, name="resized")

    repeats = [_repeats(index, size) for index, size in zip(read, sizes, strict=True)]
    tables = [relax.const(index, "int32") for index, by in zip(read, repeats, strict=True) if not by]
    return emitter.call(compute, emitter.channels_last(x), *tables, name="resize")


def _nearest(size: int, by: float, coordinates: str, rounding: str) -> Array:
    """int32: the pixel of an axis that each one of the longer (or shorter) axis is, as ONNX defines it."""
    place = np.arange(int(np.floor(size * np.float64(by))))
    exact = place / by if coordinates == "asymmetric" else (place + 0.5) / by - 0.5
    rounded = {
        "floor": np.floor(exact), "ceil": np.ceil(exact), "round_prefer_floor": np.ceil(exact - 0.5),
        "round_prefer_ceil": np.floor(exact + 0.5),
    }[rounding]  # fmt: skip
    return rounded.clip(0, size - 1).astype(np.int32)


def _repeats(index: Array, size: int) -> int:
    """How often every pixel of an axis stands in a row of them; 0 where they differ in that."""
    by = len(index) // size
    return by if by and np.array_equal(index, np.arange(size * by) // by) else 0


CONVERTERS: dict[str, Callable[[Emitter, Node], Any]] = {
    "AveragePool": pool("avg"), "BatchNormalization": batch_normalization, "Clip": clip, "Concat": concat,
    "Conv": convolution, "ConvTranspose": transposed_convolution, "DequantizeLinear": dequantize, "Flatten": flatten,
    "Gemm": dense, "GlobalAveragePool": global_average_pool, "LMA": lma, "MatMul": dense,
    "Max": extreme(relax.op.maximum), "MaxPool": pool("max"), "Min": extreme(relax.op.minimum), "PRelu": prelu,
    "Pad": pad, "QuantizeLinear": quantize, "ReduceMean": reduce_mean, "Reshape": flatten, "Resize": resize,
    "Slice": strided_slice, "Where": where,
}  # fmt: skip
