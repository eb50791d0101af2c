"""Training with rounding: torchao puts the roundings where `placement` says, the network trains around them.

Rounding is symmetric INT8 in the forward pass and the identity in the backward pass (the straight-through estimator;
Jacob et al., CVPR 2018, section 3), except that what is clipped gets no gradient.

Weights are rounded as they are, before batch normalisation scales them. With a scale per output channel that follows
from the channel's largest weight it makes no difference: folding multiplies weights and scale by the same number, and
the codes stay. So nothing has to be folded, and unfolded again, in every step of the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import onnx
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchao.quantization.pt2e.observer import ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from edgekd.activations import freeze_statistics
from edgekd.export import quiet
from edgekd.quantize import calibration, sessions
from edgekd.quantize.calibration import LARGEST
from edgekd.quantize.capture import Captured, Edge, restored
from edgekd.quantize.placement import pairs, sources

# What a batch counts for in the moving average of a range: torch.ao's constant.
_AVERAGING = 0.01


class _Round(torch.autograd.Function):
    """x -> the value of its code; scale: a number, or one for each channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x.div(scale).round_().clamp_(-LARGEST - 1, LARGEST).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        x, scale = ctx.saved_tensors
        if scale.numel() > 1:  # of weights: their largest is a code
            return grad, None
        end = (LARGEST + 0.5) * float(scale)
        return torch.ops.aten.hardtanh_backward(grad, x, -end, end), None


class Rounding(ObserverBase):  # type: ignore[misc]
    """Rounds a tensor, [...] -> [...], to symmetric INT8; `scale` is what one code was worth the last time.

    calibrating: round nothing, for the ranges are those of the float network.
    """

    scale: Tensor

    def __init__(self, **spec: Any) -> None:
        super().__init__(spec["dtype"])
        self.calibrating = False

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scale and zero point, for torchao."""
        scale = self.scale.flatten()
        return scale, torch.zeros_like(scale, dtype=torch.int64)

    def rounded(self, x: Tensor, largest: Tensor) -> Tensor:
        """The largest magnitude becomes code 127; where it is 0, so is everything."""
        self.scale = torch.where(largest > 0, largest / LARGEST, 1.0)
        y: Tensor = _Round.apply(x, self.scale)
        return y


class PerChannelWeightRounding(Rounding):
    """Rounds weights, with a scale for each output channel that follows from its largest weight."""

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        self.ch_axis: int = spec["ch_axis"]

    def forward(self, weight: Tensor) -> Tensor:
        """The same shape."""
        if self.calibrating:
            return weight
        others = [axis for axis in range(weight.dim()) if axis != self.ch_axis]
        return self.rounded(weight, weight.detach().abs().amax(others, keepdim=True))


class ActivationRounding(Rounding):
    """Rounds an activation, with one scale from the moving average of its largest magnitude in a batch.

    calibrating: take the largest of all batches instead. frozen: keep the range in training too.
    """

    largest: Tensor
    rounds = True

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        self.register_buffer("largest", torch.zeros(()))
        self.frozen = False

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        if self.calibrating or (self.training and not self.frozen):
            self._observe(x)
        return self.rounded(x, self.largest) if self.rounds and not self.calibrating else x

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        seen = torch.maximum(-low, high).to(self.largest.dtype)
        if self.calibrating:
            self.largest.copy_(torch.maximum(self.largest, seen))  # keeps a NaN
        else:
            self.largest.lerp_(seen, _AVERAGING)


class BranchRange(ActivationRounding):
    """Watches the branch of a residual addition, which only ONNX Runtime rounds, and hands it on as it is."""

    rounds = False


class PlacedQuantizer(Quantizer):  # type: ignore[misc]
    """torchao's name for what says where to round; `activations` is then who rounds which tensor of the graph."""

    def __init__(self, captured: Captured) -> None:
        super().__init__()
        self.captured = captured
        self.readers = pairs(captured.graph)
        self.activations: dict[str, ActivationRounding] = {}

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Mark the edges."""
        for layer in self.captured.graph.layers:
            position = self._position(layer.node)
            _mark([self.captured.edges[position, 1]], PerChannelWeightRounding, layer.channel_axis)
        for tensor in sources(self.captured.graph):
            rounded = self._edges(tensor)
            _mark(rounded or self._branch_edges(tensor), ActivationRounding if rounded else BranchRange)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to find: what is marked follows from the graph."""

    def prepare_obs_or_fq_callback(self, model: fx.GraphModule, edge_or_node_to_obs_or_fq: Mapping[Any, Any]) -> None:
        """Remember who rounds what."""
        for tensor in sources(self.captured.graph):
            edge = (self._edges(tensor) or self._branch_edges(tensor))[0]
            self.activations[tensor] = edge_or_node_to_obs_or_fq[edge]

    def _edges(self, source: str) -> list[Edge]:
        """Where the values of `source` are rounded. Rounding them again after they moved would change nothing."""
        moved = [tensor for tensor in self.readers if self.captured.graph.source(tensor) == source]
        readers = [sorted(self.readers[tensor]) for tensor in ([source] if source in moved else moved)]
        return list(dict.fromkeys(self.captured.edges[reader] for some in readers for reader in some))

    def _branch_edges(self, tensor: str) -> list[Edge]:
        additions = [residual.node for residual in self.captured.graph.residuals if residual.branch == tensor]
        return [self.captured.edges[self._position(node), list(node.input).index(tensor)] for node in additions]

    def _position(self, node: onnx.NodeProto) -> int:
        return next(at for at, other in enumerate(self.captured.graph.model.graph.node) if other is node)


def _mark(edges: list[Edge], rounding: type[Rounding], axis: int | None = None) -> None:
    """One rounding for all of the edges."""
    first, *others = edges
    own = QuantizationSpec(torch.int8, rounding, -LARGEST - 1, LARGEST, ch_axis=axis)
    for edge, spec in ((first, own), *((edge, SharedQuantizationSpec(first)) for edge in others)):
        maker, reader = edge
        annotation = reader.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation())
        annotation.input_qspec_map[maker] = spec


class RoundedNetwork(nn.Module):
    """A network with roundings in it, x [B, C, H, W] -> logits [B, K]. Its cuts of LMA are frozen.

    captured: the float network's, whose layers it takes over. freeze: the share of the training after which the ranges
    of activations and the statistics of batch normalisation stay as they are.
    """

    def __init__(self, captured: Captured, freeze: float) -> None:
        super().__init__()
        quantizer = PlacedQuantizer(captured)
        with quiet():
            prepared = prepare_qat_pt2e(captured.module, quantizer)
        self.network = restored(prepared, captured.layers)
        freeze_statistics(self.network)
        self.graph, self.roundings, self.freeze = captured.graph, quantizer.activations, freeze
        self.notes: list[str] = []
        self._frozen = False

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        logits: Tensor = self.network(x)
        return logits

    def calibrate(self, images: Tensor) -> None:
        """Take the ranges from images [N, C, H, W]: where training starts."""
        sessions.check_images(self.graph, images.numpy(), "calibration")
        self.eval()
        roundings = [module for module in self.modules() if isinstance(module, Rounding)]
        for rounding in roundings:
            rounding.calibrating = True
        with torch.no_grad():
            for batch in images.split(sessions.BATCH):
                self(batch)
        for rounding in roundings:
            rounding.calibrating = False
        calibration.check_finite(self.ranges())
        self.notes = calibration.remarks(self.ranges(), images.numpy())

    def ranges(self) -> dict[str, float]:
        """The largest magnitude of each tensor of the captured graph that has a scale."""
        return {tensor: float(rounding.largest) for tensor, rounding in self.roundings.items()}

    def follow(self, progress: float) -> None:
        """Where the training is, from 0 to 1: a pure function of it decides what is frozen, so that a resume agrees."""
        if self._frozen != (progress >= self.freeze):
            self._frozen = not self._frozen
            self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation, with what is frozen as in evaluation."""
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, ActivationRounding):
                module.frozen = self._frozen
            elif isinstance(module, _BatchNorm):
                module.train(mode and not self._frozen)
        return self
