"""The layer table of an engine, as TensorRT's inspector and trtexec write it in JSON."""

from __future__ import annotations

import re
from typing import Any

_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_KNOWN = {"INT8": "Int8", "FP16": "Half", "HALF": "Half", "FP32": "Float", "FLOAT": "Float", "INT32": "Int32"}


def rows_from_table(table: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each layer: name, type, inputs, constants and outputs (their data types), tactic, nodes (of the ONNX
    model, that it computes)."""
    return [_row(layer if isinstance(layer, dict) else {"Name": layer}) for layer in table["Layers"]]


def on_the_gpu(rows: list[dict[str, Any]]) -> list[str]:
    """Layers that an accelerator was asked for and the GPU computes; copies between the two do not count."""
    return [row["name"] for row in rows if row["type"] != "DLA" and "reformat" not in row["type"].lower()]


def _row(layer: dict[str, Any]) -> dict[str, Any]:
    weights = layer.get("Weights", {})
    constants = [_datatype(tensor) for tensor in layer.get("Constants", ())]
    return {
        "name": layer["Name"],
        "type": layer.get("LayerType", ""),
        "inputs": [_datatype(tensor) for tensor in layer.get("Inputs", ())],
        "constants": constants + ([weights["Type"]] if weights.get("Count") else []),
        "outputs": [_datatype(tensor) for tensor in layer.get("Outputs", ())],
        "tactic": str(layer.get("TacticName", "")),
        # Where there are no metadata, a fused layer is called after the nodes that it computes.
        "nodes": _NODE.findall(layer.get("Metadata", "")) or layer["Name"].split(" + "),
    }


def _datatype(tensor: dict[str, Any]) -> str:
    """`Int8` of a tensor: newer versions name the type, older ones have it somewhere in the format's description."""
    described = str(tensor.get("Datatype") or tensor.get("Format/Datatype", ""))
    return next((name for word, name in _KNOWN.items() if word in described.upper()), described)
