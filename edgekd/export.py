"""From torch to ONNX: one graph for every target."""

from __future__ import annotations

import ast
import collections
import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from edgekd import __version__, activations
from edgekd.errors import ExportError
from edgekd.marks import LMA_MARK

Array = npt.NDArray[np.float32]

INPUT, OUTPUT = "images", "logits"
_log = logging.getLogger(__name__)


def export(
    network: nn.Module,
    path: Path,
    *,
    example: Array,
    opset: int,
    dynamic_batch: bool,
    form: str,
    metadata: Mapping[str, Any],
    names: tuple[str, str] = (INPUT, OUTPUT),
) -> dict[str, Any]:
    """Write `network` to `path` as ONNX and return what is in it: opset, form, operators, size.

    example: float32 [1, C, H, W], or what else the network takes. form: the ONNX form of its multi-segment activations.
    metadata: put into the model, values that are no strings as JSON. names: of input and output. Batch normalisation
    is folded into the convolution or linear layer before it.
    Raises ExportError when torch cannot export the network, or only for one batch size where any is asked for.
    """
    model = _traced(
        activations.frozen(network, form).cpu().eval(), torch.from_numpy(example), opset, dynamic_batch, names
    )
    activations.add_function(model)
    _strip(model)
    model.producer_name, model.producer_version = "edgekd", __version__
    for name, value in metadata.items():
        model.metadata_props.add(key=name, value=value if isinstance(value, str) else json.dumps(value))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return {
        "opset": next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        "form": form,
        "operators": operators(model),
        "size_bytes": path.stat().st_size,
    }


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator stands in the graph, those of other domains as `domain.operator`."""
    count: collections.Counter[str] = collections.Counter()
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        count.update(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in nodes)
    return dict(sorted(count.items()))


def _traced(
    network: nn.Module, x: torch.Tensor, opset: int, dynamic_batch: bool, names: tuple[str, str]
) -> onnx.ModelProto:
    # A batch of one would be taken for a constant: the exporter needs two to see that it may vary.
    sample = torch.cat([x, x]) if dynamic_batch else x
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},) if dynamic_batch else None
    try:
        with quiet():
            program = torch.onnx.export(
                network, (sample,), dynamo=True, opset_version=opset, dynamic_shapes=shapes, input_names=[names[0]],
                output_names=[names[1]], verbose=False,
            )  # fmt: skip
    except Exception as error:
        raise ExportError(
            f"torch cannot export the network: {reason(error)}",
            allowed="needed: a forward that torch.export can trace, of operators that ONNX has",
            fix="change the network's forward; the exporter's whole report: run with --debug",
        ) from error
    assert program is not None
    model = program.model_proto
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    if dynamic_batch and not batch.dim_param:
        raise ExportError(
            "the network can be exported for one batch size only",
            allowed="its forward fixes the batch size, for example by reshape(2, -1)",
            fix="set export.batch = static, or write x.flatten(1) and x.shape[0] in its forward",
        )
    return model


def reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom: the exporter wraps it in advice on how to debug itself."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _strip(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes: stack traces with paths of this machine, most of a small file. What stays of them is
    which nodes make up which LMA layer: whoever rewrites the graph has to leave those together."""
    graph = model.graph
    for node in graph.node:
        layer = _lma_of(node)
        del node.metadata_props[:]
        node.doc_string = ""
        if layer:
            node.metadata_props.add(key=LMA_MARK, value=layer)
    for described in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del described.metadata_props[:]
        described.doc_string = ""


def _lma_of(node: onnx.NodeProto) -> str:
    """The name of the LMA layer that a node is a part of, or nothing."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    classes = ast.literal_eval(notes.get("pkg.torch.onnx.class_hierarchy", "[]"))
    scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
    frozen = f"{activations.FrozenLMA.__module__}.{activations.FrozenLMA.__qualname__}"
    return next((scope for name, scope in zip(classes, scopes, strict=False) if name == frozen), "")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter prints, logs and warns of its own deprecations; none of it is for the user, unless asked for."""
    said, disabled = io.StringIO(), logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for line in said.getvalue().splitlines():
            _log.info("exporter: %s", line)
