"""Online distillation with diverse peers.

Chen, Mei, Wang, Feng, Chen, "Online Knowledge Distillation with Diverse Peers" (OKDDip), AAAI 2020, in its variant with
separate networks: the student is the group's leader, and auxiliary peers of its architecture are trained with it. With
h_a a peer's pooled feature, L and E linear and to an eighth of its size,

    alpha_ab = softmax over b of (L h_a) . (E h_b),     t_a = sum_b alpha_ab z_b     for every sample; b = a included

    L = sum_a CE(z_a, y) + CE(z, y) + weight ( sum_a tau^2 KL(t_a || z_a) + tau^2 KL(mean_a z_a || z) )

As in the authors' code logits are mixed before the softmax, the targets t_a pass gradients on, and the weight rises as
exp(-5 (1 - e / 80)^2) over the first 80 of 300 epochs. Here the peers begin with weights of their own by the layers'
usual initialisation. In the training log are the mean Euclidean distance of the peers' probabilities, `diversity`, and
the share of the batches that the mean of the peers gets right, `peers_score`: the leader's is the student's.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import RecipeError
from edgekd.methods import Method, Setting, Step
from edgekd.methods.divergence import divergence
from edgekd.methods.features import pooled
from edgekd.methods.options import above_zero, at_least_zero
from edgekd.methods.taps import Taps, one_tap
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at

SMALLER = 8  # times, than the features, are their projections


@register("method", "online_peers")
class OnlinePeers(Method):
    """Peers of the student's architecture teach each other by attention, and all of them the student; no teacher.

    peers: auxiliary networks beside the student, from 2. weight: of all divergences. temperature: tau.
    student_taps: path of the embedding, whose map is averaged over its sites; null is that before the logits of
    edgekd's own networks.
    """

    needs_teacher = False
    needs_modules = True

    def __init__(
        self,
        *,
        peers: int = 3,
        weight: float | Schedule = {"ramp_up": [0.0, 1.0, 0.27]},  # noqa: B006 - read, never changed
        temperature: float | Schedule = 3.0,
        student_taps: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.count, self.weight, self.temperature, self.paths = peers, weight, temperature, student_taps
        above_zero("temperature", temperature, 3)
        at_least_zero("weight", weight, 1)
        if peers < 2:
            raise RecipeError(
                f"distill.peers = {peers} is not valid",
                allowed="expected: 2 or more, to teach each other",
                fix="--set distill.peers=3",
                key="distill.peers",
            )
        self.peers = nn.ModuleList()
        self._taps: list[Taps] = []

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Make the peers, and the projections of the attention."""
        path = one_tap(self.paths, student, "student")
        for _ in range(self.count):
            peer = copy.deepcopy(student).train()
            for module in peer.modules():
                if callable(initialise := getattr(module, "reset_parameters", None)):
                    initialise()
            self.peers.append(peer)
            self._taps.append(Taps(peer, [path], "student"))
        (feature,) = self._taps[0].probe(self.peers[0], setting.example).values()
        size = pooled(feature).shape[1]
        self.query = nn.Linear(size, max(1, size // SMALLER), bias=False)
        self.key = nn.Linear(size, max(1, size // SMALLER), bias=False)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: the leader's scalar, peers_ce, peers, leader: scalars}."""
        tau, features, answers = value_at(self.temperature, step.progress), [], []
        for peer, taps in zip(self.peers, self._taps, strict=True):
            with taps.recording() as seen:
                answers.append(peer(step.x).float())
            features.append(pooled(*seen.values()))
        logits = torch.stack(answers, 1)
        targets = self.attention(torch.stack(features, 1)) @ logits
        step.record("diversity", diversity(logits.detach()))
        step.record("peers_score", step.task.batch_score(logits.detach().mean(1), step.y))
        weight = value_at(self.weight, step.progress) * tau**2
        own = [divergence(targets[:, number], logits[:, number], tau) for number in range(self.count)]
        return {
            "ce": F.cross_entropy(step.student_logits, step.y),
            "peers_ce": torch.stack([F.cross_entropy(one, step.y) for one in answers]).sum(),
            "peers": weight * torch.stack(own).sum(),
            "leader": weight * divergence(logits.mean(1), step.student_logits, tau),
        }

    def attention(self, features: Tensor) -> Tensor:
        """[B, M, M] of the features [B, M, D] of M peers: how much of peer b is in the target of peer a."""
        weights: Tensor = (self.query(features) @ self.key(features).transpose(1, 2)).float().softmax(2)
        return weights


def diversity(logits: Tensor) -> Tensor:
    """The mean Euclidean distance of the probabilities of two peers, of logits [B, M, K]: a scalar."""
    probabilities = logits.softmax(2)
    away = (probabilities[:, :, None] - probabilities[:, None]).norm(dim=3)
    peers = logits.shape[1]
    mean: Tensor = away.sum((1, 2)).mean() / (peers * (peers - 1))
    return mean
