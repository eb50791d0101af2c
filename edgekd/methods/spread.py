"""One student spread over several boards, each imitating a group of the teacher's filters.

Bhardwaj, Lin, Sartor, Marculescu, "Memory- and Communication-Aware Model Compression for Distributed Deep Learning
Inference on IoT" (NoNN), 2019, and its code: the filters before the teacher's logits are partitioned, a small student
for each group imitates them, and one linear layer fuses the students. Jeong, Park, Yang, Electronics 10(14):1614, 2021,
of which the abstract was read: equal groups by eigenvectors, and more redundancy, so that a lost message costs less;
how is a reconstruction [R]. Ours: groups by recursive spectral bisection of the filters' correlations, or after NoNN's
communities of filters that are active together (`partition`), in equal sizes; copies around a ring of boards (the
network `spread`); and boards that are silent at random while the head is trained. With m_b whether
board b answers, f_b its features and t_b the teacher's of the same filters, pooled over the map as the head takes them,

    L = (1 - kd_weight) CE(z, y) + kd_weight tau^2 KL(z_T || z)
      + feature_weight mean over b of | f_b / |f_b| - t_b / |t_b| |^2

    z = head( m_b f_b ),  m_b = 0 with probability `silent`, for every sample and board; never all of them

Where it differs from NoNN: features are compared after pooling, since nothing else leaves a board; the square is summed
over a board's features (NoNN: its mean over the whole map, weight 1e4); KL is summed over the classes (NoNN: averaged,
at twice the weight). NoNN's code leaves out its largest community and gives the smallest student what is left over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import RecipeError
from edgekd.methods import Method, Setting, Step
from edgekd.methods.divergence import divergence
from edgekd.methods.features import pooled
from edgekd.methods.options import a_share, above_zero, at_least_zero, from_zero_to_one
from edgekd.methods.partition import Floats, Indices, coactivations, correlations, louvain_groups, spectral_groups
from edgekd.methods.taps import Taps, one_tap
from edgekd.networks import Spread
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at

# The partition is that of the features of so many training images, looked at in batches of so many.
IMAGES, BATCH = 512, 64
# From features [N, D] to groups of the filters, as many as there are boards.
PARTITIONS: dict[str, Callable[[Floats, int], list[Indices]]] = {
    "spectral": lambda features, boards: spectral_groups(correlations(features), boards),
    "louvain": lambda features, boards: louvain_groups(coactivations(features), boards),
}


@register("method", "spread")
class SpreadOverBoards(Method):
    """The parts of the network `spread` imitate a group of the teacher's filters each, with boards silent at random.

    kd_weight: weight of the KL term, the cross-entropy has the rest. temperature: tau. feature_weight: of the imitated
    filters. silent: probability that a board does not answer in training. partition: of the filters, by the spectrum
    of their correlations or by Louvain communities of those that are active together.
    teacher_taps: path of the teacher's embedding; null is that before the logits of edgekd's own networks.
    """

    def __init__(
        self,
        *,
        kd_weight: float | Schedule = 0.9,
        temperature: float | Schedule = 4.0,
        feature_weight: float | Schedule = 1.0,
        silent: float | Schedule = 0.25,
        partition: Literal["spectral", "louvain"] = "spectral",
        teacher_taps: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.kd_weight, self.temperature = kd_weight, temperature
        self.feature_weight, self.silent, self.paths = feature_weight, silent, teacher_taps
        self.partition = partition
        above_zero("temperature", temperature, 4)
        from_zero_to_one("kd_weight", kd_weight, 0.9)
        at_least_zero("feature_weight", feature_weight, 1)
        a_share("silent", silent, 0.25)
        self._student: tuple[Spread, ...] = ()  # in a tuple: it stays the loop's

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Share the teacher's filters out to the boards. Raises RecipeError for a student without parts."""
        assert teacher is not None
        if not isinstance(student, Spread):
            raise RecipeError(
                "the method spread trains the parts of several boards, and the student has none",
                allowed="expected: student.network = spread, with part, boards, copies and filters",
                fix="--set student.network=spread --set student.part=resnet",
                key="student.network",
            )
        self.teacher_taps = Taps(teacher, [one_tap(self.paths, teacher, "teacher")], "teacher")
        self.student_taps = Taps(student, [f"parts.{number}" for number in range(len(student.parts))], "student")
        seen = [self.teacher_taps.probe(teacher, x) for x in setting.images(IMAGES).split(BATCH)]
        features = torch.cat([pooled(*one.values()) for one in seen])
        if features.shape[1] != student.filters:
            raise RecipeError(
                f"the teacher has {features.shape[1]} filters before its logits, the student's head {student.filters}",
                allowed="expected: the same number, to be shared out to the boards",
                fix=f"--set student.filters={features.shape[1]}",
                key="student.filters",
            )
        student.share_out(PARTITIONS[self.partition](features.double().cpu().numpy(), len(student.parts)))
        self._student = (student,)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, kd: scalar, features: scalar}."""
        (student,) = self._student
        features = torch.stack([step.student_features[path] for path in self.student_taps.paths], 1)
        (filters,) = step.teacher_features.values()
        wanted = (pooled(filters) @ student.head.place.T).unflatten(1, features.shape[1:])
        distance = (F.normalize(features, dim=2) - F.normalize(wanted, dim=2)).square().sum(2)
        answering = self._answering(features, value_at(self.silent, step.progress))
        logits = student.head(features * answering[..., None]).float()
        tau, kd_weight = (value_at(option, step.progress) for option in (self.temperature, self.kd_weight))
        return {
            "ce": (1 - kd_weight) * F.cross_entropy(logits, step.y),
            "kd": kd_weight * tau**2 * divergence(step.teacher_logits, logits, tau),
            "features": value_at(self.feature_weight, step.progress) * distance.mean(),
        }

    def _answering(self, features: Tensor, silent: float) -> Tensor:
        """[B, N], 1 where a board answers; where none did, all do."""
        answering = torch.rand(features.shape[:2], device=features.device) >= silent
        return (answering | ~answering.any(1, keepdim=True)).to(features.dtype)
