"""Several source models teach each other and the student, in rounds.

After Liu et al., "An Iterative Multi-Source Mutual Knowledge Transfer Framework for Machine Reading Comprehension",
IJCAI 2020, of which the idea is known: models of several domains teach each other, many to one and all at once; each
learns from the others by the similarity of their domains to its own, then from its labels and its own previous best, in
rounds. The formulas are a reconstruction [R]. The sources are the members of the teacher (the network `ensemble`; any
other teacher is the only source). With p_j the probabilities of source j as it was given,

    D_ij = mean over the batches so far of KL(p_i || p_j),   for the student i of -log p_j(y), the same of its labels
    a_ij = softmax over j of ( -D_ij / sharpness ),   j not i: how much i learns from j

    first half of a round:   L_i = ce_weight CE(z_i, y) + weight tau^2 sum_j a_ij KL(z_j || z_i)
    second half:             L_i = ce_weight CE(z_i, y) + weight tau^2 KL(z_i at the end of the round before || z_i)

for the student and for a copy of every source, which is trained on from the source's weights; z_j is a constant in L_i.
Where ours differs: there is one data set, the student's, so a source stands for its own domain by its probabilities;
and the previous best is the end of the round before. A source's first is the source as it was given; the student, which
has none, learns from the sources all through the first round.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import RecipeError
from edgekd.methods import Method, Setting, Step
from edgekd.methods.divergence import divergence
from edgekd.methods.options import above_zero, at_least_zero
from edgekd.methods.processes import mean_over_all
from edgekd.methods.taps import Taps
from edgekd.networks import member_paths
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at


@register("method", "mutual_sources")
class MutualSources(Method):
    """Copies of an ensemble's members and the student teach each other by the similarity of their domains, in rounds.

    rounds: how often, in equal shares of the training, all learn from each other and then from their previous selves.
    weight: of the divergences. ce_weight: of the labels. temperature: tau. sharpness: of the similarities; a smaller
    one leaves less to the sources of other domains.
    """

    uses_all_parameters = False  # previous selves are kept, not trained

    def __init__(
        self,
        *,
        rounds: int = 3,
        weight: float | Schedule = 0.7,
        ce_weight: float | Schedule = 0.3,
        temperature: float | Schedule = 4.0,
        sharpness: float | Schedule = 1.0,
    ) -> None:
        super().__init__()
        self.rounds, self.weight, self.ce_weight = rounds, weight, ce_weight
        self.temperature, self.sharpness = temperature, sharpness
        above_zero("temperature", temperature, 4)
        above_zero("sharpness", sharpness, 1)
        at_least_zero("weight", weight, 0.7)
        at_least_zero("ce_weight", ce_weight, 0.3)
        if rounds < 1:
            raise RecipeError(
                f"distill.rounds = {rounds} is not valid",
                allowed="expected: 1 or more",
                fix="--set distill.rounds=3",
                key="distill.rounds",
            )
        self.sources, self.previous = nn.ModuleList(), nn.ModuleList()
        self._student: tuple[nn.Module, ...] = ()  # in a tuple: it stays the loop's
        self._paths: list[str] = []
        self.running_distance: Tensor
        self.batches: Tensor
        self.round: Tensor

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Copy the sources to train them, and all models to keep their previous selves."""
        assert teacher is not None
        self._student, self._paths = (student,), member_paths(teacher)
        self.teacher_taps = Taps(teacher, self._paths, "teacher")
        given = [teacher.get_submodule(path) for path in self._paths] or [teacher]
        self.sources = nn.ModuleList(copy.deepcopy(one).requires_grad_(True).train() for one in given)
        self.previous = nn.ModuleList(copy.deepcopy(one) for one in (*self.sources, student)).requires_grad_(False)
        count = len(self.sources)
        self.register_buffer("running_distance", torch.zeros(count + 1, count, device=setting.example.device))
        self.register_buffer("batches", torch.zeros((), device=setting.example.device))
        self.register_buffer("round", torch.zeros((), dtype=torch.int64, device=setting.example.device))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: the student's scalar, kd: its divergence; sources_ce, sources: sums over the sources}."""
        at = min(self.rounds - 1, int(step.progress * self.rounds))
        if at != int(self.round):
            self._remember(at)
        logits = [source(step.x).float() for source in self.sources] + [step.student_logits]
        similarity = self._similarities(step)
        tau = value_at(self.temperature, step.progress)
        alone = step.progress * self.rounds - at >= 0.5
        kl = [
            self._from_itself(number, one, step.x, tau)
            if alone and (at or number < len(self.sources))
            else self._from_others(number, logits, similarity[number], tau)
            for number, one in enumerate(logits)
        ]
        ce_weight = value_at(self.ce_weight, step.progress)
        kd_weight = value_at(self.weight, step.progress) * tau**2
        ce = [ce_weight * F.cross_entropy(one, step.y) for one in logits]
        return {
            "ce": ce[-1],
            "kd": kd_weight * kl[-1],
            "sources_ce": torch.stack(ce[:-1]).sum(),
            "sources": kd_weight * torch.stack(kl[:-1]).sum(),
        }

    def _from_others(self, number: int, logits: list[Tensor], similarity: Tensor, tau: float) -> Tensor:
        teachers = [(j, one) for j, one in enumerate(logits[:-1]) if j != number]
        if not teachers:  # one source alone has nobody but the student to learn from
            return divergence(logits[-1].detach(), logits[number], tau)
        parts = [similarity[j] * divergence(one.detach(), logits[number], tau) for j, one in teachers]
        return torch.stack(parts).sum()

    def _from_itself(self, number: int, own: Tensor, x: Tensor, tau: float) -> Tensor:
        previous = self.previous[number].eval()
        with torch.no_grad():
            target = previous(x).float()
        return divergence(target, own, tau)

    def _given(self, step: Step) -> list[Tensor]:
        """The logits [B, K] of the sources as they were given."""
        return [step.teacher_features[path] for path in self._paths] if self._paths else [step.teacher_logits]

    @torch.no_grad()
    def _similarities(self, step: Step) -> Tensor:
        """a_ij [S + 1, S] of S sources, the student last; after this batch."""
        given = [one.log_softmax(1) for one in self._given(step)]
        rows = [torch.stack([(own.exp() * (own - one)).sum(1).mean() for one in given]) for own in given]
        rows.append(torch.stack([F.nll_loss(one, step.y) for one in given]))
        if self.training:
            self.batches += 1
            self.running_distance += (mean_over_all(torch.stack(rows)) - self.running_distance) / self.batches
        count = len(given)
        itself = torch.eye(count + 1, count, dtype=torch.bool, device=step.x.device)
        if count == 1:
            return torch.ones_like(self.running_distance)
        sharpness = value_at(self.sharpness, step.progress)
        similarity = (-self.running_distance / sharpness).masked_fill(itself, -torch.inf).softmax(1)
        for number in range(count):
            step.record(f"similarity_{number}", similarity[-1, number])
        return similarity

    @torch.no_grad()
    def _remember(self, at: int) -> None:
        """Every model's previous self is what it is now: a round begins."""
        for previous, now in zip(self.previous, (*self.sources, *self._student), strict=True):
            previous.load_state_dict(now.state_dict())
        self.round.fill_(at)
