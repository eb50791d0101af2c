"""A network by its name in a recipe: registered, from timm or torchvision, or the user's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgekd import registry
from edgekd.errors import RecipeError
from edgekd.networks.activation_swap import swap_activations
from edgekd.networks.adapters import foreign_network
from edgekd.networks.counts import example_of, probing
from edgekd.networks.weights import load_weights

if TYPE_CHECKING:
    from edgekd.data import Shape

_log = logging.getLogger(__name__)


def build(
    name: str,
    options: Mapping[str, Any],
    shape: Shape,
    num_classes: int,
    activation: tuple[str, Mapping[str, Any]],
    seed: int,
    *,
    maps: tuple[int, ...] = (),
) -> nn.Module:
    """Build a network that maps float32 [B,C,H,W] to logits [B,K], on the CPU, in training mode.

    maps: [H,W] where every pixel has answers of its own: the logits are [B,K,H,W] then.

    `name` is a registered network, `timm:NAME`, `torchvision:NAME` or `module:callable`. The activation `relu` leaves
    the network as its authors built it: ReLU in all of edgekd's own but mobilenet_v2, which has ReLU6; any other one
    replaces all its activations, and a warning is logged for each that it cannot. The weights depend on `seed` alone,
    and the global random state is left as it was.
    Raises RecipeError (unknown name or option, something that is no such network), MissingError (a package is absent).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if ":" in name:
            network = foreign_network(name, options, shape, num_classes)
        else:
            network = registry.create("network", name, shape, num_classes, options=options, where="network")
        network.float().train()
        _check_logits(name, network, shape, (num_classes, *maps))
        if activation[0] != "relu":
            _check_untrained(name, network, activation[0])
            report = swap_activations(network, *activation, example_of(network, shape))
            if not report.swapped:
                raise RecipeError(
                    f'network "{name}" has no activation that could become {activation[0]!r}',
                    allowed="; ".join(f"{path}: {why}" for path, why in report.left.items()) or "it has none at all",
                    fix='use activation "relu", which leaves the network as it is',
                )
            _check_logits(name, network, shape, (num_classes, *maps))
            for path, why in report.left.items():
                _log.warning("network %s keeps its own activation %s: %s", name, path, why)
    return network


def build_chosen(chosen: Mapping[str, Any], shape: Shape, num_classes: int) -> nn.Module:
    """Build what a `NetworkChoice` names, with the weights of its checkpoint if it has one.

    Its other weights depend on torch's random state. Raises what `build` and `load_weights` raise.
    """
    beside = ("network", "activation", "checkpoint")
    ((activation, activation_options),) = chosen["activation"].items()
    options = {key: value for key, value in chosen.items() if key not in beside}
    seed = int(torch.randint(1 << 31, ()))
    network = build(chosen["network"], options, shape, num_classes, (activation, activation_options), seed)
    if chosen["checkpoint"] is not None:
        load_weights(network, chosen["checkpoint"])
    return network


def is_trained(network: nn.Module) -> bool:
    """Whether a network brought its weights along when it was built: there is nothing to train or to load."""
    return bool(getattr(network, "is_trained", False))


def _check_untrained(name: str, network: nn.Module, activation: str) -> None:
    if is_trained(network):
        raise RecipeError(
            f'network "{name}" is trained already, and activation {activation!r} would change it',
            allowed="its members have activations of their own: {network: NAME, activation: NAME, checkpoint: FILE}",
            fix="give the activation to its members",
        )


def _check_logits(name: str, network: nn.Module, shape: Shape, outputs: tuple[int, ...]) -> None:
    """Raise RecipeError unless a batch of two images gives [2,*outputs]."""
    wanted = ",".join(map(str, outputs))
    example = example_of(network, shape)
    size = str(shape)
    try:
        with probing(network):
            logits = network(example)
    except Exception as error:  # the forward may be anybody's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            f'network "{name}" fails on images of {size}: {reason}',
            allowed=f"needed: float32 [B,{size.replace('x', ',')}] in, logits [B,{wanted}] out",
            fix="use a network, or options of this one, for images of this size",
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (len(example), *outputs):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RecipeError(
            f'network "{name}" gives {found} for 2 images of {size}',
            allowed=f"needed: logits, a tensor {[2, *outputs]}: "
            + (
                "an answer for every pixel, as edgekd's unet gives"
                if len(outputs) > 1
                else "one row for each image, one column for each class"
            ),
            fix="make its forward return the logits alone, with num_classes columns"
            if len(outputs) == 1
            else "use a network that keeps the size of the image",
        )
