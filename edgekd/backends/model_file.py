"""An ONNX file as somebody gives it: whether it can be run at all, and all that belongs to it in one file."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from edgekd.artifact import sha256_of
from edgekd.errors import StageError

SHOWN_CHARACTERS = 200
FULL = (errno.ENOSPC, errno.EDQUOT)


def require(file: Path, *, open_sizes: bool = False) -> None:
    """Raise StageError unless it is a model that edgekd's runners can run, whatever the backend.

    They give a model one array of float32, and take its first output. open_sizes: whether the backend takes a model
    with more left open than the batch.
    """
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf and the operating system have no common error
        raise _invalid(file, f"it is cut off, damaged or something else ({_line(error)})") from error
    if not model.HasField("graph"):
        raise _invalid(file, "there is no graph in it")
    known = onnx.defs.onnx_opset_version()
    newest = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if newest > known:
        raise StageError(
            f"{file.name} is written in opset {newest}",
            allowed=f"onnx {onnx.__version__} here knows those up to {known}",
            fix="export it in a lower opset, or take a newer onnx: pip install --upgrade onnx",
        )
    if lost := [name for name in external(model) if not (file.parent / name).is_file()]:
        raise StageError(
            f"the weights of {file.name} are in {', '.join(lost)}, which is not beside it",
            allowed=f"looked in {file.parent.resolve()}",
            fix="copy all files of the model, or export it into one",
        )
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:  # its classes have no common one either
        raise _invalid(file, _line(error)) from error
    if what := _unfit(model.graph, open_sizes):
        raise StageError(
            f"{file.name} {what[0]}", allowed="expected: one input of float32, as images [B, C, H, W]", fix=what[1]
        )


def _unfit(graph: onnx.GraphProto, open_sizes: bool) -> tuple[str, str] | None:
    """Why no runner can run it, and what to do."""
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1:
        named = ", ".join(value.name for value in inputs) or "none"
        return f"has {len(inputs)} inputs: {named}", "cut out what has one: onnx.utils.extract_model"
    kind = inputs[0].type.tensor_type
    if kind.elem_type != onnx.TensorProto.FLOAT:
        given = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
        return f"takes {inputs[0].name} as {given}", "export it with float32 outside; inside it may be of any type"
    sizes = [one.dim_value if one.HasField("dim_value") else one.dim_param or "?" for one in kind.shape.dim]
    if not open_sizes and any(isinstance(size, str) for size in sizes[1:]):
        shape = f"[{', '.join(map(str, sizes))}]"
        fix = "fix all sizes but the batch's: python -m onnxruntime.tools.make_dynamic_shape_fixed --help"
        return f"takes {inputs[0].name} {shape}, of which more than the batch is open", fix
    return None


def external(model: onnx.ModelProto) -> list[str]:
    """The files beside it in which a model has weights, relative to its own folder."""
    tensors = [*model.graph.initializer, *(one.t for node in model.graph.node for one in node.attribute)]
    return sorted({ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)})


def digests(file: Path) -> dict[str, str]:
    """sha256 of an ONNX file and of those beside it in which it has weights, by name; of itself alone if it is none."""
    found = {"onnx": sha256_of(file)}
    try:
        beside = external(onnx.load(str(file), load_external_data=False))
    except Exception:  # whoever compiles it says what is wrong
        return found
    return found | {name: sha256_of(file.parent / name) for name in beside if (file.parent / name).is_file()}


def write(file: Path, out: Path) -> None:
    """Copy an ONNX file with all its weights in it. Raises StageError when those do not fit into one."""
    if not external(onnx.load(str(file), load_external_data=False)):
        shutil.copyfile(file, out)
        return
    try:
        onnx.save(onnx.load(str(file)), str(out))
    except Exception as error:  # protobuf, numpy and onnx have no common error
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise StageError(
            f"the weights of {file} cannot be read into one file: {_line(error)}",
            allowed="expected: all that it names beside it, of at most 2 GB",
            fix="copy its files again, or export a smaller model",
        ) from error


def _invalid(file: Path, why: str) -> StageError:
    return StageError(
        f"{file.name} is not valid ONNX: {why}", allowed="expected: an ONNX model", fix="export the model again"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:SHOWN_CHARACTERS] or type(error).__name__
