"""What a build on the board made: the precision in which each layer really runs, from the engine's layer table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from pydantic import Field

from edgekd.backends.tensorrt.compiler import Kernel, kernels_from_rows, node_name
from edgekd.backends.tensorrt.on_device.build import LAYERS, MODEL, PLAN, RESULT
from edgekd.backends.tensorrt.on_device.layers import on_the_gpu, rows_from_table
from edgekd.documents import Count, Document, Text, fitting, parsed
from edgekd.quantize.graph import Graph
from edgekd.quantize.rules import layer_name, layers_with_weights

UNKNOWN = "unknown"
# A kernel that reads codes and does not multiply them makes floats of them first.
_FLOATS = {"Half": "fp16", "Float": "fp32", "BFloat16": "bf16", "Int8": "float"}
NAMED = 5  # layers that an alarm names
LAYERS_LIMIT_BYTES = 64 << 20


class Identity(Document):
    """What an engine belongs to, see `on_device.identity`."""

    onnx: Text
    flags: dict[str, Any]
    tensorrt: Text
    compute_capability: Text
    multiprocessors: Count
    device: Text
    l4t: Text | None


class Tried(Document):
    """A way to ask for a precision, and why it was refused."""

    mode: Text
    refused: list[Text]


class Milliseconds(Document, extra="allow"):
    """Of a part of an inference, in trtexec's words."""

    __pydantic_extra__: dict[str, float]
    median: float


_UNTIMED = Milliseconds(median=0.0)


class Timed(Document):
    """What trtexec measured, as far as it did."""

    latency: Milliseconds = _UNTIMED
    enqueue: Milliseconds = _UNTIMED
    copy_in: Milliseconds = _UNTIMED
    compute: Milliseconds = _UNTIMED
    copy_out: Milliseconds = _UNTIMED
    throughput_per_s: float | None = None
    warnings: list[Text] = Field([])


class Built(Document):
    """build.json, see `on_device.build`."""

    module: Text
    version: Text
    mode: Text
    tried: list[Tried]
    seconds: float
    identity: Identity
    files: dict[Text, list[Text | Count]]
    argv: list[list[Text]] = Field([])
    timed: dict[Text, Timed] = Field({})


class Row(Document):
    """A layer, see `on_device.layers`."""

    name: Text
    type: Text
    inputs: list[Text]
    constants: list[Text]
    outputs: list[Text]
    tactic: Text
    nodes: list[Text]


class Table(Document):
    """layers.json, as its rows were read."""

    rows: list[Row]


def account(folder: Path) -> dict[str, Any]:
    """The result of a build from the files that it left in a folder: what they say, whoever wrote them.

    Returns:
        evidence, size_bytes, what build.json says but for its `files`, layers: rows {layer, operator, asked, ran,
        kernel}, kernels: their number, alarms: sentences.

    Raises StageError, ValueError, KeyError, TypeError or AttributeError when the files are not what a build leaves.
    """
    built = fitting(parsed((folder / RESULT).read_text(encoding="utf-8"), RESULT), Built, RESULT)
    settings = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    found = {name: value for name, value in built.items() if name != "files"}
    found |= {"evidence": "built_on_device", "size_bytes": int(built["files"][PLAN][1])}
    if not (folder / LAYERS).is_file():
        alarm = f"TensorRT {built['version']} lists no layers: in which precision they run is not known"
        return found | {"layers": [], "kernels": None, "alarms": [alarm]}
    table = parsed((folder / LAYERS).read_text(encoding="utf-8"), LAYERS, limit=LAYERS_LIMIT_BYTES)
    rows = fitting({"rows": rows_from_table(table)}, Table, LAYERS)["rows"]
    layers = layer_rows(onnx.load(str(folder / MODEL)), kernels_from_rows(rows))
    alarms = [*float_alarm(layers), *(_gpu_alarm(on_the_gpu(rows)) if settings["dla_core"] >= 0 else ())]
    return found | {"layers": layers, "kernels": len(rows), "alarms": alarms}


def layer_rows(model: onnx.ModelProto, kernels: tuple[Kernel, ...]) -> list[dict[str, str]]:
    """A row for each layer with weights: the precision that the model asks for, and the one that its kernel has."""
    graph = Graph(model)
    return [
        {
            "layer": layer_name(node, graph), "operator": node.op_type, "asked": _asked(node, graph),
            **_ran(node_name(node), kernels),
        }
        for node in layers_with_weights(graph)
    ]  # fmt: skip


def _asked(node: onnx.NodeProto, graph: Graph) -> str:
    maker = graph.makers.get(node.input[1])
    if maker is not None and maker.op_type == "DequantizeLinear":
        return "int8"
    weight = graph.constants.get(node.input[1])
    return "fp16" if weight is not None and weight.dtype == np.float16 else "fp32"


def _ran(name: str, kernels: tuple[Kernel, ...]) -> dict[str, str]:
    """The kernel that multiplies for a node. One that casts or reorders for it has its name too; a small product may be
    a kernel of elementwise steps."""
    named = [kernel for kernel in kernels if name in kernel.nodes and "reformat" not in kernel.type.lower()]
    integer = [kernel for kernel in named if kernel.multiplies_integers]
    accelerated = [kernel for kernel in kernels if kernel.type == "DLA"]
    if not named and accelerated:  # it is given as one layer, named after its first and last node
        return {"ran": "on the DLA", "kernel": accelerated[0].name}
    if not named:
        return {"ran": UNKNOWN, "kernel": ""}
    kernel = (integer or [one for one in named if one.multiplies] or named)[0]
    # What is fused with elementwise steps reads what those need; its weights tell.
    kinds = kernel.inputs if kernel.multiplies or "Half" not in kernel.constants else ("Half",)
    ran = "int8" if integer else next((_FLOATS[kind] for kind in kinds if kind in _FLOATS), UNKNOWN)
    return {"ran": ran, "kernel": kernel.name}


def float_alarm(layers: Sequence[Mapping[str, str]]) -> list[str]:
    """A sentence where layers that ask for INT8 run in float."""
    asked = [row for row in layers if row["asked"] == "int8"]
    other = [row["layer"] for row in asked if row["ran"] not in ("int8", "on the DLA", UNKNOWN)]
    return [f"{len(other)} of {len(asked)} layers that ask for INT8 run in float: {_names(other)}"] if other else []


def _gpu_alarm(left: list[str]) -> list[str]:
    return [f"the DLA was asked for, and the GPU computes {len(left)} layers: {_names(left)}"] if left else []


def _names(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
