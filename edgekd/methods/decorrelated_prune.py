"""Pruning where channels are not correlated, healed by distillation.

Xie, "Redundancy-aware pruning of convolutional neural networks", Neural Computation 32(12):2532, 2020, of which the
abstract is known here: the input and the output of a convolution are mapped by orthogonal transforms to a space without
correlation, and neurons are evaluated and pruned there. The rest is a reconstruction [R]. With the covariances over
training images and sites, of outputs U diag(l) U^T and of inputs V diag(m) V^T, the leading r and q components stay:

    W_rq = U_r (U_r^T W V_q) V_q^T,      as three layers: 1x1 V_q^T (I to q), the kernel (q to r), 1x1 U_r (r to O)

r and q are the fewest components of a share of the variance, the same share in every convolution: the largest for which
the convolutions have no more than `macs` of their multiply-accumulates. A side whose transform would cost more than it
saves keeps its channels. What the other components have as a mean goes into the bias, if there is one: of outputs as
(I - U_r U_r^T) mean(y); batch normalisation behind the convolution takes it out by itself. From then on the weights
are projected after every update, while the student is distilled on: they end with exactly these ranks, and the exported
network has the smaller layers. Depthwise and grouped convolutions and linear layers stay. Transforms of neighbours are
not merged, as batch normalisation and activation stand between them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import RecipeError
from edgekd.methods import Method, Setting, Step
from edgekd.methods.attacks import evaluating
from edgekd.methods.divergence import divergence
from edgekd.methods.kd import KD
from edgekd.methods.options import above_zero, from_zero_to_one
from edgekd.methods.processes import sum_over_all
from edgekd.networks.factoring import can_be_factored, cheapest, map_areas
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at

# Covariances are those of the batches in this share of the training before the pruning.
WINDOW = 0.1
HALVINGS = 30


class Spectrum(NamedTuple):
    """Of a map's channels: mean [C], and eigenvalues [C], ascending, and eigenvectors [C, C] of their covariance."""

    mean: Tensor
    values: Tensor
    vectors: Tensor


@register("method", "decorrelated_prune")
class DecorrelatedPrune(Method):
    """Convolutions lose the components of their inputs and outputs that vary least; distillation heals the student.

    macs: the share of the multiply-accumulates of the convolutions that is left. prune_at: the share of the training
    after which it happens; before, the whole student is trained. kd_weight: share of KL in the loss. temperature: tau.
    """

    def __init__(
        self,
        *,
        macs: float = 0.5,
        prune_at: float = 0.5,
        kd_weight: float | Schedule = 0.7,
        temperature: float | Schedule = 4.0,
    ) -> None:
        super().__init__()
        self.macs, self.prune_at, self.kd_weight, self.temperature = macs, prune_at, kd_weight, temperature
        above_zero("temperature", temperature, 4)
        from_zero_to_one("kd_weight", kd_weight, 0.7)
        for name, share in (("macs", macs), ("prune_at", prune_at)):
            if not 0 < share < 1:
                raise RecipeError(
                    f"distill.{name} = {share:g} is not valid",
                    allowed="expected: a share, above 0 and below 1",
                    fix=f"--set distill.{name}=0.5",
                    key=f"distill.{name}",
                )
        self.paths: list[str] = []
        self.decided: Tensor

    @property
    def ready(self) -> float:
        """When the pruning is done; in a training of few steps the batches before `prune_at` may have shown nothing."""
        return self.prune_at if self.decided else 1.0

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Find the convolutions. Raises RecipeError for a student without any."""
        self._areas = map_areas(student, setting.example)
        modules = dict(student.named_modules())
        self._convs = {path: conv for path in self._areas if can_be_factored(conv := modules[path])}
        if not self._convs:
            raise RecipeError(
                "the student has no convolution that could be pruned",
                allowed="needed: two-dimensional convolutions in one group, padded with zeros or not at all",
                fix="use another student, or another distill.method",
                key="distill.method",
            )
        self.register_buffer("decided", setting.example.new_zeros(()))
        for number, conv in enumerate(self._convs.values()):
            for side, channels in (("in", conv.in_channels), ("out", conv.out_channels)):
                # The sums of 1, y and y y^T over samples and sites, and in the end the projection.
                for name, shape in (("count", ()), ("sum", (channels,)), ("squares", (channels, channels))):
                    self.register_buffer(f"{side}_{name}_{number}", setting.example.new_zeros(shape))
                self.register_buffer(f"{side}_projection_{number}", torch.eye(channels).to(setting.example))

    def finetuning(self) -> Method:
        """Plain distillation: the student has been pruned."""
        return KD(kd_weight=self.kd_weight, temperature=self.temperature)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, kd: scalar}."""
        if not self.decided and step.progress >= self.prune_at - WINDOW:
            self._observe(step)
        tau, kd_weight = value_at(self.temperature, step.progress), value_at(self.kd_weight, step.progress)
        return {
            "ce": (1 - kd_weight) * F.cross_entropy(step.student_logits, step.y),
            "kd": kd_weight * tau**2 * divergence(step.teacher_logits, step.student_logits, tau),
        }

    def constrain(self, student: nn.Module, *, step_size: float, progress: float) -> None:
        """From the pruning on: the weights are brought back to the components that were kept."""
        if not self.decided:
            if progress < self.prune_at or not self.get_buffer("in_count_0"):
                return
            self._decide(student)
        with torch.no_grad():
            for number, path in enumerate(self._convs):
                into, out = (self.get_buffer(f"{side}_projection_{number}") for side in ("in", "out"))
                weight = student.get_parameter(f"{path}.weight")
                weight.copy_(torch.einsum("po,oihw,iq->pqhw", out, weight, into))

    def _observe(self, step: Step) -> None:
        """Add up what the convolutions read and give for this batch, of all processes."""

        def adder(number: int) -> Any:
            def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                for side, maps in (("in", inputs[0]), ("out", output)):
                    values = maps.detach().float().movedim(1, -1).flatten(0, -2)
                    sums = {"count": values.new_tensor(len(values)), "sum": values.sum(0), "squares": values.T @ values}
                    for name, value in sums.items():
                        self.get_buffer(f"{side}_{name}_{number}").add_(sum_over_all(value))

            return add

        hooks = [conv.register_forward_hook(adder(number)) for number, conv in enumerate(self._convs.values())]
        try:
            with evaluating(step.student), torch.no_grad():
                step.student(step.x)
        finally:
            for hook in hooks:
                hook.remove()

    def _decide(self, student: nn.Module) -> None:
        spectra = [{side: self._spectrum(side, number) for side in ("in", "out")} for number in range(len(self._convs))]
        whole, low, high = self._cost(spectra, 1.0)[1], 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._cost(spectra, middle)[1] <= self.macs * whole else (low, middle)
        for number, (path, ranks) in enumerate(zip(self._convs, self._cost(spectra, low)[0], strict=True)):
            for side, rank in zip(("in", "out"), ranks, strict=True):
                vectors = spectra[number][side].vectors[:, -rank:]
                if rank < len(vectors):
                    self.get_buffer(f"{side}_projection_{number}").copy_(vectors @ vectors.T)
            if (bias := dict(student.named_parameters()).get(f"{path}.bias")) is not None:
                read, given = spectra[number]["in"].mean.to(bias), spectra[number]["out"].mean.to(bias) - bias.detach()
                into, out = (self.get_buffer(f"{side}_projection_{number}") for side in ("in", "out"))
                kernel = student.get_parameter(f"{path}.weight").detach().sum((2, 3))
                bias.data += given - out @ given + out @ kernel @ (read - into @ read)
        self.decided.fill_(1)

    def _spectrum(self, side: str, number: int) -> Spectrum:
        count, total, squares = (
            self.get_buffer(f"{side}_{name}_{number}").double() for name in ("count", "sum", "squares")
        )
        mean = total / count
        values, vectors = torch.linalg.eigh(squares / count - mean[:, None] * mean)
        return Spectrum(mean, values.clamp_min(0), vectors)

    def _cost(self, spectra: list[dict[str, Spectrum]], share: float) -> tuple[list[tuple[int, int]], float]:
        """The ranks (q, r) of all convolutions that keep this share of each variance, and their MACs in all."""
        ranks, total = [], 0.0
        for (path, conv), sides in zip(self._convs.items(), spectra, strict=True):
            q, r = (components(sides[side].values, share) for side in ("in", "out"))
            q, r, macs = cheapest(conv, q, r, self._areas[path])
            ranks.append((q, r))
            total += macs
        return ranks, total


def components(values: Tensor, share: float) -> int:
    """How many of the largest eigenvalues [C], which are ascending, make up this share of their sum; 1 at least."""
    if share >= 1:
        return len(values)
    reached = values.flip(0).cumsum(0) >= share * values.sum()
    return int(reached.long().argmax()) + 1 if reached.any() else len(values)
