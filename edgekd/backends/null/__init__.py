"""A backend without a runtime, to try and test everything around one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

from edgekd.backends import Backend, write_settings
from edgekd.errors import StageError
from edgekd.registry import register


@register("backend", "null")
class Null(Backend):
    """No runtime: reads the model's shapes, waits `latency_ms` per query and answers zeros.

    Its engine says so in its facts. Its accuracy is that of always naming class 0.
    """

    name = "null"
    precisions = ("fp32", "fp16", "int8")
    builds_on = "host"
    forms: ClassVar = {"any": "where", "continuous": "relu_sum"}
    runner = Path(__file__).with_name("runner.py")

    def __init__(self, *, latency_ms: float = 0.0) -> None:
        self.latency_ms = latency_ms

    def available(self) -> str:
        """Empty, or why the model's shapes cannot be read here."""
        return "" if importlib.util.find_spec("onnx") else "onnx not installed: pip install onnx"

    def check(self, onnx: Path) -> list[str]:
        """Whether the file is ONNX from [B, C, H, W] to [B, K] with C, H, W and K known."""
        try:
            _shapes(onnx)
        except StageError as error:
            return [error.what]
        return []

    def compile(self, onnx: Path, out: Path, *, threads: int) -> dict[str, Any]:
        """Keep the shapes of the model's input and output, and nothing else."""
        self.require()
        image, answer = _shapes(onnx)
        settings = {
            "backend": self.name,
            "threads": threads,
            "image": image,
            "answer": answer,
            "latency_ms": self.latency_ms,
        }
        write_settings(out, settings)
        from edgekd.backends.null import runner

        facts: dict[str, Any] = runner.load(str(out)).facts
        return facts


def _shapes(path: Path) -> tuple[list[int], list[int]]:
    """[C, H, W] of the input and [K] of the output, or [K, H, W] of maps."""
    import onnx

    from edgekd.backends import model_file

    model_file.require(path, open_sizes=True)
    model = onnx.load(str(path), load_external_data=False)
    image, logits = (
        [dimension.dim_value for dimension in value[0].type.tensor_type.shape.dim]
        for value in (model.graph.input, model.graph.output)
    )
    if len(image) < 4 or len(logits) < 2 or 0 in (*image[1:], *logits[1:]):
        raise StageError(
            f"{path} goes from {image} to {logits}",
            allowed="from [B, C, H, W] to [B, K] with only B left open",
            fix="export with a fixed image size",
        )
    return image[1:], logits[1:]
