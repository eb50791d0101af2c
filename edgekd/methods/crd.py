"""Contrastive representation distillation.

Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, eq. 10 to 19. Student's and teacher's
embeddings of one sample are a positive pair, those of samples of two classes negative ones. With v the L2-normalised
linear projections, N samples in the training set, M negatives for each sample, noise P_n = 1 / N, and

    h(v, w) = exp(v.w / tau) / Z,     L(v; w) = -log( h+ / (h+ + M P_n) ) - sum_negatives log( M P_n / (h- + M P_n) )

both directions are summed: the student's v against the teacher's w from a memory, and the other way round. The memories
hold one vector for every training sample and follow by `momentum`. As in the authors' code Z is fixed at the first
batch (N times the mean of exp), and negatives are drawn from all samples of another class; here with replacement, and
4,096 by default, where theirs are 16,384.

With several processes each has its own samples, and all memories take in the vectors of all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import RecipeError
from edgekd.methods import Setting, Step
from edgekd.methods.features import FeatureMethod
from edgekd.methods.options import a_share, above_zero, at_least_zero
from edgekd.methods.processes import mean_over_all, rows_of_all
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at

# Keeps the logarithm of a vanishing probability finite, as in the authors' code.
EPSILON = 1e-7


@register("method", "crd")
class CRD(FeatureMethod):
    """Embeddings of one sample in both networks attract each other, those of different classes repel.

    weight: of the contrastive term. ce_weight: weight of the cross-entropy. negatives: M, for each sample.
    dimensions: of the projections. temperature: tau of the similarities. momentum: of the memories.
    student_taps, teacher_taps: one module path each, whose maps are averaged over their sites; null is the embedding
    before the logits of edgekd's own networks.
    """

    place = "embedding"
    student_memory: Tensor
    teacher_memory: Tensor
    partition: Tensor
    order: Tensor
    class_size: Tensor
    class_end: Tensor

    def __init__(
        self,
        *,
        weight: float | Schedule = 0.8,
        ce_weight: float | Schedule = 1.0,
        negatives: int = 4096,
        dimensions: int = 128,
        temperature: float | Schedule = 0.07,
        momentum: float | Schedule = 0.5,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self.weight, self.ce_weight, self.negatives = weight, ce_weight, negatives
        self.dimensions, self.temperature, self.momentum = dimensions, temperature, momentum
        above_zero("temperature", temperature, 0.07)
        a_share("momentum", momentum, 0.5)
        above_zero("negatives", negatives, 4096)
        above_zero("dimensions", dimensions, 128)
        at_least_zero("weight", weight, 0.8)
        at_least_zero("ce_weight", ce_weight, 1)

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Make the projections and the memories. Raises RecipeError when the data has one class, or taps are many."""
        super().attach(student, teacher, setting)
        _check(self.student_taps.paths, setting.labels)
        self.student_projection = nn.Linear(self.student_sizes[0][0], self.dimensions)
        self.teacher_projection = nn.Linear(self.teacher_sizes[0][0], self.dimensions)
        count, labels = len(setting.labels), setting.labels.cpu()
        for owner in ("student", "teacher"):
            self.register_buffer(f"{owner}_memory", F.normalize(torch.randn(count, self.dimensions)))
        self.register_buffer("partition", torch.zeros(2))  # Z of both directions, 0 until the first batch
        # Sorted by class, the samples of all other classes are a run: `order` from the end of one's own class around.
        sizes = labels.bincount(minlength=setting.num_classes)
        self.register_buffer("order", labels.argsort(stable=True), persistent=False)
        self.register_buffer("class_size", sizes, persistent=False)
        self.register_buffer("class_end", sizes.cumsum(0), persistent=False)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, contrast: scalar}."""
        ((student, teacher),) = self.pairs(step)
        v, w = F.normalize(self.student_projection(student).float()), self.teacher_projection(teacher).float()
        w = F.normalize(w)
        negatives = self._negatives(step.y)
        columns = torch.cat((step.index[:, None], negatives), 1)
        tau = value_at(self.temperature, step.progress)
        contrast = self._contrast(v, self.teacher_memory, columns, 0, tau)
        contrast = contrast + self._contrast(w, self.student_memory, columns, 1, tau)
        self._remember(step.index, v.detach(), w.detach(), value_at(self.momentum, step.progress))
        return {
            "ce": value_at(self.ce_weight, step.progress) * F.cross_entropy(step.student_logits, step.y),
            "contrast": value_at(self.weight, step.progress) * contrast,
        }

    def _negatives(self, y: Tensor) -> Tensor:
        """int64 [B, M]: samples of other classes than each of y [B], by their places in the training split."""
        count = len(self.order)
        others = (count - self.class_size[y])[:, None]
        drawn = (torch.rand(len(y), self.negatives, device=y.device) * others).long().minimum(others - 1)
        rows: Tensor = self.order[(self.class_end[y][:, None] + drawn) % count]
        return rows

    def _contrast(self, vectors: Tensor, memory: Tensor, columns: Tensor, direction: int, tau: float) -> Tensor:
        """The loss of eq. 18 for vectors [B, D]; the first of columns [B, 1 + M] is the sample itself."""
        count, chosen = len(memory), columns.shape[1] - 1
        # All similarities in one product: gathering M vectors for each sample takes far more memory.
        exponentials = (vectors @ memory.clone().T / tau).exp().gather(1, columns)
        if self.partition[direction] == 0:
            self.partition[direction] = mean_over_all(exponentials.detach().mean()) * count
        h, noise = exponentials / self.partition[direction].clone(), chosen / count
        positive = (h[:, :1] / (h[:, :1] + noise + EPSILON)).log()
        negative = (noise / (h[:, 1:] + noise + EPSILON)).log()
        return -(positive.sum() + negative.sum()) / len(vectors)

    @torch.no_grad()
    def _remember(self, index: Tensor, v: Tensor, w: Tensor, momentum: float) -> None:
        index, v, w = (rows_of_all(one) for one in (index, v, w))
        for memory, vectors in ((self.student_memory, v), (self.teacher_memory, w)):
            memory[index] = F.normalize(momentum * memory[index] + (1 - momentum) * vectors)


def _check(taps: tuple[str, ...], labels: Tensor) -> None:
    if len(taps) != 1:
        raise RecipeError(
            f"crd compares one embedding of each network, and {len(taps)} are tapped: {', '.join(taps)}",
            allowed="expected: one module path",
            fix="name one in distill.student_taps and one in distill.teacher_taps",
            key="distill.student_taps",
        )
    if labels.min() == labels.max():
        raise RecipeError(
            "crd needs samples of two classes, and all training samples are of one",
            allowed="negative pairs are samples of different classes",
            fix="give data with two classes or more, or use distill.method = kd",
            key="distill.method",
        )
