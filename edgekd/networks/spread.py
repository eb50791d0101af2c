"""One network as parts for several boards, and the head that fuses what those answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgekd.errors import RecipeError
from edgekd.networks.building import build_chosen
from edgekd.registry import NetworkChoice, register

if TYPE_CHECKING:
    from edgekd.data import Shape


@register("network")
def spread(
    shape: Shape, num_classes: int, *, part: NetworkChoice, boards: int = 4, copies: int = 1, filters: int = 64
) -> nn.Module:
    """A small network for each of several boards, which gives a share of the features, and a head over all of them.

    part: NAME or {network: NAME, option: value}, the same for every board, with weights of its own. copies: how many
    boards give each feature; with 2, any one board may be silent. filters: features of the head, equally shared out;
    for the method `spread` as many as the teacher has before its logits. Maps [B,C,H,W] to logits [B,K].
    Raises RecipeError for numbers that do not fit together.
    """
    if boards < 2 or not 1 <= copies <= boards or filters < boards or filters % boards:
        raise RecipeError(
            f"network spread cannot share {filters} filters out to {boards} boards, each to {copies} of them",
            allowed="allowed: 2 boards or more, filters a multiple of boards, copies from 1 to boards",
            fix=f"set filters = {max(1, filters // max(boards, 2)) * max(boards, 2)}, and copies = 1 or 2",
        )
    each = filters // boards * copies
    return Spread([build_chosen(part, shape, each) for _ in range(boards)], filters, copies, num_classes)


class Spread(nn.Module):
    """Parts [B,C,H,W] to [B,F] for N boards, and their `head`; together, with all boards answering, a network."""

    def __init__(self, parts: list[nn.Module], filters: int, copies: int, num_classes: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.copies, self.filters = copies, filters
        self.head = FusingHead(len(parts), filters, copies, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B,K] of images [B,C,H,W]."""
        features = torch.stack([part(x) for part in self.parts], 1)
        logits: Tensor = self.head.fc(features.flatten(1) @ self.head.place / self.copies)
        return logits

    def share_out(self, groups: list[npt.NDArray[np.int64]]) -> None:
        """Give every board its filters: one group of `filters` / N each, and with copies those of its neighbours.

        Board i of a ring gives the groups i, i + 1, ..., as many as there are copies.
        """
        self.head.place.copy_(place_of(groups, self.copies))


class FusingHead(nn.Module):
    """From what the boards answered to logits: the mean over the boards that know a feature, then a linear layer.

    place: [N F, filters], 1 where a board's output is that feature.
    """

    def __init__(self, boards: int, filters: int, copies: int, num_classes: int) -> None:
        super().__init__()
        runs = np.arange(filters, dtype=np.int64).reshape(boards, -1)
        self.place: Tensor
        self.register_buffer("place", place_of(list(runs), copies))
        self.fc = nn.Linear(filters, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B,K] of features [B,N,F], in which a board that is silent has zeros only.

        Features that nobody gave are 0, and the others are raised by their share, as dropout does it.
        """
        answered = (features.abs().amax(2, keepdim=True) > 0).to(features.dtype).expand_as(features)
        counts = answered.flatten(1) @ self.place
        mean = features.flatten(1) @ self.place / counts.clamp(min=1)
        known = (counts > 0).to(features.dtype).mean(1, keepdim=True)
        logits: Tensor = self.fc(mean / known.clamp(min=1 / self.place.shape[1]))
        return logits


def place_of(groups: list[npt.NDArray[np.int64]], copies: int) -> Tensor:
    """[N F, filters] of N equal groups of filters around a ring of boards."""
    boards = len(groups)
    slots = np.concatenate([groups[(board + copy) % boards] for board in range(boards) for copy in range(copies)])
    return torch.eye(sum(map(len, groups)))[torch.from_numpy(slots)]
