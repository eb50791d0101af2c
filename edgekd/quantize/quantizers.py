"""What a recipe names under `quantize.method`: a class under `@register("quantizer", NAME)` that keeps one of these.

Its keyword-only parameters are the user's options. A `ModelQuantizer` works on the exported ONNX model; a
`TrainingQuantizer` trains the student further, under the recipe's distillation method, as it will be computed.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy.typing as npt

from edgekd.errors import MissingError
from edgekd.tasks import Judge

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = npt.NDArray[Any]


class Quantizer(ABC):
    """How the student gets smaller than float32."""

    # What an engine computes in.
    precision: ClassVar[Literal["fp32", "fp16", "int8"]]
    trains: ClassVar[bool] = False
    # Python packages that it needs, and the extra of edgekd that brings them.
    needs: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = "train"

    def require(self) -> None:
        """Raise MissingError unless everything that it needs is installed."""
        missing = [package for package in self.needs if importlib.util.find_spec(package) is None]
        if missing:
            raise MissingError(
                f"{type(self).__name__} needs the Python package {missing[0]!r}, which is not installed",
                allowed=f"it needs: {', '.join(self.needs)}",
                fix=f"pip install 'edgekd[{self.extra}]'",
            )


@dataclass(frozen=True)
class Samples:
    """What a quantizer may look at, never the test split.

    calibration: float32 [N, C, H, W], normalised. images: the validation split, float32 [M, C, H, W], with
    its judge. target: the score on it that is asked for; None without a budget.
    """

    calibration: Array
    images: Array
    judge: Judge
    target: float | None = None
    on_progress: Callable[[float, str], None] = lambda share, text: None


class ModelQuantizer(Quantizer):
    """A quantizer of ONNX models."""

    @abstractmethod
    def write(self, model: Path, out: Path, samples: Samples) -> dict[str, Any]:
        """Quantize the float `model` to the file `out`; return facts for the manifest, with `warnings`."""


class TrainingQuantizer(Quantizer):
    """A quantizer that trains: `epochs` long, from the learning rate `lr`, else as the section distill says."""

    trains: ClassVar[bool] = True
    # Whether what `prepare` makes has the student's modules under their names, for methods that tap them.
    keeps_modules: ClassVar[bool] = True
    epochs: int
    lr: float

    @abstractmethod
    def prepare(self, network: nn.Module, images: Tensor) -> nn.Module:
        """The trained float student as a trainable module that computes as the deployed model will.

        images: calibration images, float32 [N, C, H, W], normalised. Calls: x [B, C, H, W] -> logits [B, K].
        """

    @abstractmethod
    def export(
        self, trained: nn.Module, network: nn.Module, out: Path, *, example: Array, opset: int, form: str,
        dynamic_batch: bool, metadata: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Write what `prepare` made, now trained, as the deployed ONNX model; return facts for the manifest.

        network: the float student, which also gets the trained weights. The rest is as in `edgekd.export.export`.
        """
