"""Quantization-aware training: the student learns to be right in spite of INT8, from the same teacher as before."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import onnx

from edgekd.errors import ExportError, RecipeError
from edgekd.quantize import placement
from edgekd.quantize.calibration import LARGEST
from edgekd.quantize.graph import load
from edgekd.quantize.quantizers import Array, TrainingQuantizer
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("quantizer", "qat")
class QAT(TrainingQuantizer):
    """INT8 with training: the student is distilled on with its roundings in place (Jacob et al., CVPR 2018).

    Where pairs stand, and how codes are made, is as for `ptq` with minmax, whose ranges the training starts from.
    freeze: the share of the training after which the ranges of activations and the statistics of batch normalisation
    stay, so that its end fits what is deployed (Krishnamoorthi, arXiv 1806.08342, section 3.2). The cuts of LMA stay
    from the start; its slopes and biases are trained.
    """

    precision: ClassVar[Literal["int8"]] = "int8"
    needs: ClassVar[tuple[str, ...]] = ("torch", "torchao")
    extra: ClassVar[str] = "qat"
    keeps_modules: ClassVar[bool] = False

    def __init__(self, *, epochs: int = 3, lr: float = 0.002, freeze: float = 0.66) -> None:
        if not 0 <= freeze <= 1:
            raise RecipeError(
                f"quantize.freeze = {freeze:g} is not a share of the training",
                allowed="allowed: 0 (ranges of the calibration throughout) to 1 (never frozen)",
                fix="set quantize.freeze = 0.66",
                key="quantize.freeze",
            )
        self.epochs, self.lr, self.freeze = epochs, lr, freeze

    def prepare(self, network: nn.Module, images: Tensor) -> nn.Module:
        """See `TrainingQuantizer`. Raises MissingError without torchao, ExportError for what cannot be traced, and
        DataError for images that do not fit."""
        self.require()
        from edgekd import export
        from edgekd.quantize.capture import capture

        with export.quiet():  # torchao complains of kernels for GPUs that it cannot load
            from edgekd.quantize.pt2e import RoundedNetwork
        prepared = RoundedNetwork(capture(network, images[:1]), self.freeze)
        prepared.calibrate(images)
        return prepared

    def export(
        self, trained: nn.Module, network: nn.Module, out: Path, *, example: Array, opset: int, form: str,
        dynamic_batch: bool, metadata: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """See `TrainingQuantizer`.

        torch.onnx exports the trained float network, and the pairs are put in by the code that does it for `ptq`, with
        the ranges of the training: one placement, one naming, one folding of batch normalisation.
        """
        from edgekd import export
        from edgekd.quantize.pt2e import RoundedNetwork

        assert isinstance(trained, RoundedNetwork)
        network.load_state_dict(trained.network.state_dict(), strict=False)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "float.onnx"
            facts = export.export(
                network, file, example=example, opset=opset, dynamic_batch=dynamic_batch, form=form, metadata=metadata
            )
            graph = load(file)
        ranges = trained.ranges()
        captured, exported = placement.roles(trained.graph), placement.roles(graph)
        if captured.keys() != exported.keys():
            raise _unlike(captured.keys() ^ exported.keys())
        scales = {exported[role]: np.float32((ranges[captured[role]] / LARGEST) or 1) for role in exported}
        model = placement.quantized(graph, scales)
        onnx.save(model, str(out))
        rounded = placement.pairs(graph)
        return facts | {
            "operators": export.operators(model), "size_bytes": out.stat().st_size, "pairs": len(rounded),
            "layers": [layer.name for layer in graph.layers], "lma": [region.name for region in graph.lma],
            "scales": {tensor: float(scales[graph.source(tensor)]) for tensor in rounded},
            "keep_float": [], "warnings": trained.notes,
        }  # fmt: skip


def _unlike(roles: set[tuple[str, ...]]) -> ExportError:
    """The error for a network whose exported graph is built in another way than the trained one."""
    first = ", ".join(min(roles))
    return ExportError(
        f"the exported graph is not the one that was trained with rounding: they differ in what is the {first}",
        allowed="allowed: convolutions, linear layers on [B, D], and what ONNX has one operator for around them",
        fix="set quantize.method = ptq",
    )
