"""The proof that an exported graph computes what torch computes, on real samples.

Both sum in another order, so logits differ by rounding: 1e-6 of the largest logit, say. Where the network itself jumps
(LMA does at a cut) an input within rounding of the jump may land on the other side, and the logits then differ by far
more although the graph is right. Neither a tolerance that lets this pass nor one that lets it fail would be honest. So
every sample beyond the tolerance has to be explained by torch alone: with pixels changed by little more than rounding,
its own logits must move as far. A wrong graph is not explained so, because torch stands still.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgekd.errors import ExportError
from edgekd.tasks import Task

Array = npt.NDArray[Any]
Images = Callable[[Array], Array]

# Change of the pixels, as a share of the sample's largest: enough to cross a jump as rounding may (float32 has 6e-8,
# which a network's layers add up), too little to move the logits of a smooth network beyond any sensible tolerance.
NUDGE = 1e-5
NUDGES = 16
# How much farther than torch moves by itself a sample of the graph may be off.
MARGIN = 2.0
CHUNK = 100


@dataclass(frozen=True)
class Parity:
    """How the logits of a graph compare with those of torch for the same samples.

    max_abs_error: of a logit; max_relative_error: in units of the sample's largest logit, or of 1 where that is
    smaller. at_jumps: samples beyond the tolerance that torch explains; unexplained: those found that it does not.
    worst_sample: the worst unexplained sample, without one the worst of all; worst_torch and worst_onnx are its
    numbers, on a map those of the worst place. agreement: as the task has it.
    """

    samples: int
    max_abs_error: float
    max_relative_error: float
    agreement: float
    at_jumps: int
    unexplained: int
    worst_sample: int
    worst_torch: list[float]
    worst_onnx: list[float]
    tolerance: float

    def check(self, what: str) -> None:
        """Raises ExportError with the worst sample's numbers when a sample is off and torch does not explain it."""
        if not self.unexplained:
            return
        error = float(np.abs(np.subtract(self.worst_onnx, self.worst_torch)).max())
        raise ExportError(
            f"{what} differs from torch by {error:.3g} at test sample {self.worst_sample}"
            f" (agreement {self.agreement:.2%} of {self.samples})",
            allowed=f"tolerance {self.tolerance:g} of the largest logit; "
            f"torch {_row(self.worst_torch)}, ONNX {_row(self.worst_onnx)}",
            fix="try another export.form or export.opset; or raise export.tolerance, if this agreement will do",
        )

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def parity(network: nn.Module, images: Images, expected: Array, got: Array, tolerance: float, task: Task) -> Parity:
    """Compare the logits of torch (`expected`) and of the graph (`got`) for the same N samples, float32 [N, ...] each.

    network: the torch network, on the CPU and in eval mode; images: gives the samples of some indices as it is fed
    them, float32 [n, C, H, W]. Both are asked about the samples beyond the tolerance only.
    Raises ExportError when the shapes differ.
    """
    if got.shape != expected.shape:
        raise ExportError(
            f"the graph returns logits {list(got.shape)}, torch {list(expected.shape)}",
            allowed="expected: the same shape",
            fix="make the network's forward treat every image of a batch alike",
        )
    error = _largest(got.astype(np.float64) - expected)
    error[np.isnan(error)] = np.inf
    relative = error / np.maximum(1, _largest(expected))
    beyond = np.flatnonzero(~(relative <= tolerance))
    unexplained = _unexplained(network, images, error, beyond[np.argsort(-error[beyond], kind="stable")])
    worst = int(unexplained[0]) if len(unexplained) else int(np.argmax(relative))
    worst_torch, worst_onnx = _where_worst(expected[worst], got[worst])
    return Parity(
        samples=len(expected),
        max_abs_error=float(error.max()),
        max_relative_error=float(relative.max()),
        agreement=task.agreement(expected, got),
        at_jumps=0 if len(unexplained) else len(beyond),
        unexplained=len(unexplained),
        worst_sample=worst,
        worst_torch=worst_torch,
        worst_onnx=worst_onnx,
        tolerance=tolerance,
    )


def _unexplained(network: nn.Module, images: Images, error: Array, beyond: Array) -> Array:
    """Of the samples `beyond` the tolerance, the worst first: those that torch does not explain; looks no farther than
    the first hundred of which one is left."""
    rng = np.random.default_rng(0)
    for chunk in (beyond[at : at + CHUNK] for at in range(0, len(beyond), CHUNK)):
        x = images(chunk)
        still, reach = _logits(network, x), NUDGE * np.abs(x).max(tuple(range(1, x.ndim)), keepdims=True)
        moved = np.zeros(len(chunk))
        for _ in range(NUDGES):
            nudged = (x + reach * rng.standard_normal(x.shape)).astype(np.float32)
            moved = np.maximum(moved, _largest(_logits(network, nudged) - still))
            if (error[chunk] <= MARGIN * moved).all():
                break
        else:
            return chunk[~(error[chunk] <= MARGIN * moved)]
    return beyond[:0]


@torch.no_grad()
def _logits(network: nn.Module, x: Array) -> Array:
    logits: Array = network(torch.from_numpy(x)).numpy()
    return logits


def _largest(values: Array) -> Array:
    """The largest magnitude of each sample: [N, ...] to [N]."""
    return np.asarray(np.abs(values).reshape(len(values), -1).max(1))


def _where_worst(expected: Array, got: Array) -> tuple[list[float], list[float]]:
    """The K numbers of both for one sample [K, ...]: on a map, those of the place where they differ most."""
    expected, got = (values.reshape(len(values), -1).astype(np.float64) for values in (expected, got))
    at = int(np.abs(got - expected).max(0).argmax())
    return expected[:, at].tolist(), got[:, at].tolist()


def _row(logits: list[float]) -> str:
    return "[" + " ".join(f"{value:.4g}" for value in logits[:10]) + (" ...]" if len(logits) > 10 else "]")
