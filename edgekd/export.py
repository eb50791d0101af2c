"""From torch to ONNX: one graph for every target, and the proof that it computes what torch computes."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from edgekd import activations
from edgekd.errors import ExportError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Parity:
    """How the exported graph compares with torch on the same samples."""

    samples: int
    max_abs_error: float
    top1_agreement: float
    worst_sample: int
    worst_torch: list[float]
    worst_onnx: list[float]

    def check(self, tolerance: float, what: str) -> None:
        """Raises ExportError with the worst sample's numbers when a logit is off by more than `tolerance`."""
        if self.max_abs_error <= tolerance:  # written so that NaN fails
            return
        raise ExportError(
            f"{what} differs from torch by {self.max_abs_error:.3g} at sample {self.worst_sample}"
            f" (top-1 agreement {self.top1_agreement:.2%} of {self.samples})",
            allowed=f"tolerance {tolerance:g}; torch {_row(self.worst_torch)}, ONNX {_row(self.worst_onnx)}",
            fix="try another export.form, or raise export.tolerance if the agreement is good enough for you",
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(
    network: nn.Module,
    path: Path,
    *,
    example: Array,
    opset: int,
    dynamic_batch: bool,
    form: str,
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `network` to `path` as ONNX and return what is in it: opset, operators, size.

    example: float32 [1, C, H, W]. form: the ONNX form of its multi-segment activations. metadata: put into the model,
    values as JSON. Batch normalisation is folded into the convolutions. Raises ExportError.
    """
    ready = activations.frozen(network, form).cpu().eval()
    x = torch.from_numpy(example)
    # A batch of one would be taken for a constant: the exporter needs two to see that it may vary.
    sample = torch.cat([x, x]) if dynamic_batch else x
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},) if dynamic_batch else None
    with _quiet():
        try:
            program = torch.onnx.export(
                ready, (sample,), dynamo=True, opset_version=opset, dynamic_shapes=shapes, input_names=["images"],
                output_names=["logits"], verbose=False,
            )  # fmt: skip
        except Exception as error:
            raise ExportError(
                f"torch cannot export the network: {str(error).strip().splitlines()[0][:200]}",
                allowed="the network must be traceable by torch.export",
                fix="run with --debug for the exporter's whole report",
            ) from error
    assert program is not None
    model = program.model_proto
    activations.add_function(model)
    _strip(model)
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


def _strip(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes on every node: stack traces with paths of this machine, most of a small model's bytes."""
    graph = model.graph
    for described in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del described.metadata_props[:]
        described.doc_string = ""


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator stands in a model, local functions included; names carry their domain unless standard."""
    count: collections.Counter[str] = collections.Counter()
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        count.update(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in nodes)
    return dict(sorted(count.items()))


def parity(expected: Array, got: Array) -> Parity:
    """Compare the logits of torch and of the graph for the same samples, float32 [N, K] each."""
    if got.shape != expected.shape:
        raise ExportError(f"the graph returns {list(got.shape)}, torch {list(expected.shape)}", fix="run with --debug")
    error = np.abs(got.astype(np.float64) - expected).max(axis=1)
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    return Parity(
        samples=len(expected),
        max_abs_error=float(error[worst]),
        top1_agreement=float((got.argmax(1) == expected.argmax(1)).mean()),
        worst_sample=worst,
        worst_torch=[float(v) for v in expected[worst]],
        worst_onnx=[float(v) for v in got[worst]],
    )


def _row(logits: list[float]) -> str:
    return "[" + " ".join(f"{value:.4g}" for value in logits[:10]) + (" ...]" if len(logits) > 10 else "]")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks on stdout and warns of its own deprecations; neither is for our user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
