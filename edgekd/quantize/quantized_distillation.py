"""Quantized distillation: the student computes with weights of 4 or 8 bits while the teacher corrects it.

Polino, Pascanu, Alistarh: "Model compression via distillation and quantization", ICLR 2018, section 3 and algorithm 1:
every step goes forward and back with Q(W), and the gradient at Q(W) moves the float W (straight through). It is the
quantizer that the LMA paper uses (Xu et al., AAAI-20, supplement). Activations stay in float. Q is in `buckets`.

All parameter tensors are quantized, those of batch normalisation and LMA too, but for the first and the last in order
of registration, as in the code of the LMA paper. Which these are depends on the network's constructor: here the weight
of the first convolution and the bias of the last layer; reading that code, there the weight of the last layer and the
biases of the last activation.

Our own choices, which the published code leaves open: what is validated, kept and deployed is the network with Q(W);
the statistics of batch normalisation and of LMA's cuts go on following the batches in training, and are in float.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx

from edgekd.errors import RecipeError, StageError
from edgekd.quantize import account
from edgekd.quantize.graph import load
from edgekd.quantize.packing import Packed, float_from_packed, with_packed
from edgekd.quantize.quantizers import TrainingQuantizer
from edgekd.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekd.quantize.buckets import Buckets

Array = npt.NDArray[Any]
# Sixteen levels leave 18 to 20 dB of bell-shaped weights.
LOW_SQNR_DB = 12.0


@register("quantizer", "quantized_distillation")
class QuantizedDistillation(TrainingQuantizer):
    """Weights of 4 or 8 bits, trained so with the teacher (Polino et al., ICLR 2018); activations stay in float.

    bits: of a weight. bucket: how many weights share a range; each bucket costs 64 bits more.
    epochs, lr: how long to train on, and from which learning rate.
    """

    precision: ClassVar[Literal["fp32"]] = "fp32"
    needs: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxruntime")

    def __init__(self, *, bits: Literal[4, 8] = 8, bucket: int = 256, epochs: int = 20, lr: float = 0.01) -> None:
        if bucket < 2 or bucket % 2:
            raise RecipeError(
                f"quantize.bucket = {bucket} cannot be packed",
                allowed="allowed: even, from 2; the papers use 256",
                fix="set quantize.bucket = 256",
                key="quantize.bucket",
            )
        self.bits, self.bucket, self.epochs, self.lr = bits, bucket, epochs, lr

    def prepare(self, network: nn.Module, images: Tensor) -> nn.Module:
        """A copy of the network that computes with Q(W) in training and in eval mode, [B, C, H, W] -> [B, K].

        Its modules keep their names; a quantized parameter is registered as torch.nn.utils.parametrize does it.
        images: the account of `export` is over the first of them. Raises StageError for weights that have no range.
        """
        from torch.nn.utils import parametrize

        from edgekd.quantize.buckets import Rounded

        self.images = images[: account.IMAGES].cpu().numpy()
        prepared = copy.deepcopy(network)
        names = [name for name, _ in prepared.named_parameters()][1:-1]
        if not names:
            raise StageError(
                "the network has no weights to quantize: the first and the last of its parameters stay in float",
                allowed="needed: at least 3 parameter tensors",
                fix="use a deeper network, or another quantize.method",
            )
        for name in names:
            module, leaf = _place(prepared, name)
            check_range(name, getattr(module, leaf))
            parametrize.register_parametrization(module, leaf, Rounded(self.bits, self.bucket), unsafe=True)
        return prepared

    def export(
        self, trained: nn.Module, network: nn.Module, out: Path, *, example: Array, opset: int, form: str,
        dynamic_batch: bool, metadata: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Write the model with its weights packed; `network` gets the values that they stand for.

        Facts next to those of `edgekd.export.export`: bits, bucket; packed, unpacked: names of the layers' weights
        that are stored in bits and in float; bits_per_weight: what a packed one takes in the file, with the ranges of
        the buckets; account: layers, compared with the same network with its float weights; warnings.
        """
        from edgekd import export
        from edgekd.quantize.buckets import encode

        settings: dict[str, Any] = {
            "example": example, "opset": opset, "form": form, "dynamic_batch": dynamic_batch, "metadata": metadata,
        }  # fmt: skip
        originals = dict(_originals(trained))
        for name, weight in originals.items():
            check_range(name, weight)
        coded = {name: encode(weight, self.bits, self.bucket) for name, weight in originals.items()}
        state = {name: getattr(*_place(trained, name)).detach().cpu() for name in network.state_dict()}
        with tempfile.TemporaryDirectory() as folder:
            network.load_state_dict(state | originals)
            export.export(network, Path(folder, "float.onnx"), **settings)
            unrounded = load(Path(folder, "float.onnx"))
        network.load_state_dict(state)
        facts = export.export(network, out, **settings)
        weights = {name: _packed(codes, self.bits) for name, codes in coded.items() if len(codes.shape) > 1}
        model = with_packed(onnx.load(str(out)), weights)
        rows = account.layers(unrounded, float_from_packed(model), {}, self.images)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, str(out))
        made = {node.output[0] for node in model.graph.node if node.op_type == f"Unpack{self.bits}"}
        return {
            **facts,
            "size_bytes": out.stat().st_size,
            "operators": export.operators(model),
            "bits": self.bits,
            "bucket": self.bucket,
            "packed": [name for name in weights if name in made],
            "unpacked": [name for name, value in network.named_parameters() if value.dim() > 1 and name not in made],
            "bits_per_weight": _bits_per_weight([weights[name] for name in weights if name in made]),
            "account": {"layers": [row | {"suggestion": self._suggestion(row)} for row in rows]},
            "warnings": list(_warnings(coded)),
        }

    def _suggestion(self, row: account.Row) -> str:
        if row["weights_sqnr_db"] >= LOW_SQNR_DB:
            return ""
        more = ", or quantize.bits = 8" if self.bits == 4 else ""
        few = f"{self.bits} bits keep {row['weights_sqnr_db']:.0f} dB of the weights of {row['layer']}"
        return f"{few}: a few large ones stretch their buckets; set a smaller quantize.bucket{more}."


def _originals(trained: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The float weights behind the quantized ones, by the names that they have in the float network."""
    for path, module in trained.named_modules():
        for leaf, parametrization in getattr(module, "parametrizations", {}).items():
            yield f"{path}.{leaf}".removeprefix("."), parametrization.original.detach().cpu()


def check_range(name: str, weight: Tensor) -> None:
    """Raises StageError for a weight with no finite range, which no bits can cover."""
    values = weight.detach().float()
    if not (values.max() - values.min()).isfinite():  # two finite ends can be too far apart for float32
        bad = int((~values.isfinite()).sum())
        raise StageError(
            f"the weights {name} cannot be quantized: " + (f"{bad} of {values.numel()} are NaN or infinite" if bad
            else f"their range, {values.min():.3g} to {values.max():.3g}, is infinite in float32"),
            allowed="expected: every weight of the float student is finite",
            fix="train the student again, with a lower train.lr or with train.clip = 1",
        )  # fmt: skip


def _place(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return network.get_submodule(path), leaf


def _packed(codes: Buckets, bits: int) -> Packed:
    return Packed(
        bits, codes.codes.numpy().astype(np.uint8), codes.step.numpy(), codes.minimum.numpy(), tuple(codes.shape),
        np.ones((), np.float32),
    )  # fmt: skip


def _bits_per_weight(packed: list[Packed]) -> float | None:
    if not packed:
        return None
    stored = (values.nbytes for one in packed for part, values in one.constants().items() if part not in _NOT_OF_Q)
    return float(8 * sum(stored) / sum(np.prod(one.shape) for one in packed))


# What batch normalisation leaves in a folded layer, and the shape, are not the quantizer's.
_NOT_OF_Q = ("factor", "shape")


def _warnings(coded: dict[str, Buckets]) -> Iterator[str]:
    for name, codes in coded.items():
        if len(codes.shape) > 1 and not codes.codes.any() and bool((codes.minimum == codes.minimum[0]).all()):
            yield f"the weights {name} are all {codes.minimum[0].item():g}: their layer tells no input from another"
