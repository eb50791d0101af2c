"""Running a model with ONNX Runtime while it is being quantized, in batches that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from edgekd.errors import DataError
from edgekd.quantize.graph import Graph

if hasattr(onnxruntime, "disable_telemetry_events"):
    onnxruntime.disable_telemetry_events()

Array = npt.NDArray[Any]

BATCH = 64
BYTES_AT_ONCE = 64 << 20  # of activations that are looked at together


def opened(model: onnx.ModelProto, optimized: str = "") -> onnxruntime.InferenceSession:
    """A session on the CPU; `optimized` is a file for the graph that ONNX Runtime makes of the model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a waiting thread leaves its core alone
    if optimized:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def logits(model: onnx.ModelProto, images: Array) -> Array:
    """What a model answers: float32 [N, C, H, W] -> float32 [N, K]."""
    session, graph = opened(model), Graph(model)
    name, output = graph.image.name, model.graph.output[0].name
    found = [session.run([output], {name: images[at]})[0] for at in _slices(len(images), fixed_batch(graph) or BATCH)]
    return np.concatenate(found)


def activations(
    graph: Graph, tensors: Sequence[str], images: Array, size: int | None = None
) -> Iterator[dict[str, Array]]:
    """The values of `tensors`, in batches of `size`: by default as many images as `batch_size` says."""
    if not tensors:
        return
    image = graph.image.name
    asked = [name for name in tensors if name != image]
    session = opened(_showing(graph.model, asked))
    for at in _slices(len(images), size or batch_size(graph, tensors, images)):
        values = dict(zip(asked, session.run(asked, {image: images[at]}) if asked else [], strict=True))
        yield values | ({image: images[at]} if image in tensors else {})


def batch_size(graph: Graph, tensors: Sequence[str], images: Array) -> int:
    """How many images to look at together: at most 64, and 64 MiB of values, unless one image alone has more."""
    if size := fixed_batch(graph):
        return size
    (one,) = activations(graph, tensors, images[:1], size=1)
    return max(1, min(BATCH, BYTES_AT_ONCE // sum(value.nbytes for value in one.values())))


def fixed_batch(graph: Graph) -> int:
    """How many images the model takes at once; 0 when that is open."""
    dimensions = graph.image.type.tensor_type.shape.dim
    return int(dimensions[0].dim_value) if dimensions else 0


def check_images(graph: Graph, images: Array, what: str) -> None:
    """Raises DataError unless `images` are float32 [N, C, H, W] that the model takes, all finite."""
    wanted = [dimension.dim_value for dimension in graph.image.type.tensor_type.shape.dim][1:]
    shown = "x".join(str(size or "any") for size in wanted)
    if images.ndim != len(wanted) + 1 or any(
        need and need != got for need, got in zip(wanted, images.shape[1:], strict=True)
    ):
        raise DataError(
            f"the {what} images are {list(images.shape)}, the model takes {shown}",
            allowed=f"expected: float32 [N, {shown.replace('x', ', ')}]",
            fix="use images of the data set that the network was trained on, prepared in the same way",
        )
    if not len(images):
        raise DataError(
            f"there are no {what} images", allowed="expected: at least 1", fix="give some: 100 to 500 are usual"
        )
    if images.dtype != np.float32:
        raise DataError(
            f"the {what} images are {images.dtype}",
            allowed="expected: float32, normalised as in training",
            fix="normalise them: (pixel / 255 - mean) / std",
        )
    bad = np.flatnonzero(~np.isfinite(images.reshape(len(images), -1)).all(1))
    if len(bad):
        raise DataError(
            f"{what} image {bad[0]} holds NaN or infinity",
            allowed=f"{len(bad)} of {len(images)} images do",
            fix="repair the data, or leave these images out",
        )
    if (batch := fixed_batch(graph)) and len(images) % batch:
        raise DataError(
            f"the model takes {batch} images at once, and there are {len(images)} {what} images",
            allowed=f"expected: a multiple of {batch}",
            fix="export with export.batch = dynamic, or give a multiple",
        )


def _showing(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The model with `tensors` as its outputs; what only its own outputs need is not computed."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors
    )
    return shown


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(at, at + size) for at in range(0, n, size))
