"""Several trained networks as one, whose logits are their mean: a teacher that every method can learn from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from edgekd.errors import RecipeError, shown
from edgekd.networks.building import build_chosen
from edgekd.registry import NetworkChoice, register

if TYPE_CHECKING:
    from edgekd.data import Shape


@register("network")
def ensemble(
    shape: Shape,
    num_classes: int,
    *,
    members: list[NetworkChoice],
    mean: Literal["logits", "probabilities"] = "logits",
) -> nn.Module:
    """The mean of trained networks: each of `members` is {network: NAME, its options, checkpoint: FILE}.

    mean: of the logits, which at every temperature is the geometric mean of the probabilities, normalised; or of the
    probabilities (at temperature 1), of which the logarithm is given as logits. Maps [B,C,H,W] to logits [B,K].
    Raises RecipeError for fewer than two members or one without a checkpoint, CheckpointError where one does not fit.
    """
    if len(members) < 2:
        raise RecipeError(
            f"an ensemble of {len(members)} is none",
            allowed="expected: two members or more, each {network: NAME, checkpoint: FILE, its options}",
            fix="add members, or name the one network itself",
        )
    for number, member in enumerate(members):
        if member["checkpoint"] is None:
            raise RecipeError(
                f"member {number} of the ensemble, {shown(member['network'])}, has no checkpoint",
                allowed="an ensemble is made of networks that are trained already",
                fix="train it by a recipe of its own: .edgekd/store/teacher/*/weights.safetensors is its checkpoint",
            )
    return Ensemble([build_chosen(member, shape, num_classes) for member in members], mean)


class Ensemble(nn.Module):
    """Networks side by side; `is_trained`, since they bring their weights along."""

    is_trained = True

    def __init__(self, members: list[nn.Module], mean: Literal["logits", "probabilities"]) -> None:
        super().__init__()
        self.members, self.mean = nn.ModuleList(members), mean

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B,K] of images [B,C,H,W]."""
        logits = torch.stack([member(x) for member in self.members])
        if self.mean == "logits":
            return logits.mean(0)
        return logits.log_softmax(2).logsumexp(0) - math.log(len(logits))


def member_paths(network: nn.Module) -> list[str]:
    """The module paths of an ensemble's members; none for any other network.

    A method that wants each member's logits taps these paths: they come with the ensemble's one forward.
    """
    return [f"members.{number}" for number in range(len(network.members))] if isinstance(network, Ensemble) else []
