"""Taps: what modules inside a network compute, read while it computes its logits. The network stays as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgekd.errors import RecipeError, unknown
from edgekd.networks.ensemble import member_paths
from edgekd.networks.mobilenet import MobileNetV2
from edgekd.networks.resnet import CifarResNet, WideResNet
from edgekd.networks.sensor import Sensor
from edgekd.networks.unet import UNet

Owner = Literal["student", "teacher"]
Place = Literal["maps", "embedding"]


class Taps:
    """The outputs of the modules at `paths` of a network, by path.

    Hooks are there during `recording` only, so the network that is validated, copied and exported has none; the modules
    are those that the loop trains, whatever they are wrapped in.
    Raises RecipeError when the network has no module of that path.
    """

    def __init__(self, network: nn.Module, paths: Sequence[str], owner: Owner) -> None:
        self.owner: Owner = owner
        known = dict(network.named_modules())
        for path in paths:
            if path not in known or not path:
                raise unknown(
                    f"distill.{owner}_taps", path, [name for name in known if name], noun=f"module of the {owner}",
                    fix="name modules that it has", listed=True,
                )  # fmt: skip
        self._modules = {path: known[path] for path in paths}

    @property
    def paths(self) -> tuple[str, ...]:
        """In the order in which they were given."""
        return tuple(self._modules)

    def __or__(self, other: Taps) -> Taps:
        """The taps of both, which are on one network."""
        both = Taps(nn.Module(), (), self.owner if self._modules else other.owner)
        both._modules = self._modules | other._modules
        return both

    @contextlib.contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """What the modules compute from here on, float32, in the mapping that is given; a second call overwrites."""
        features: dict[str, Tensor] = {}
        handles = [module.register_forward_hook(self._keeper(path, features)) for path, module in self._modules.items()]
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()

    def _keeper(self, path: str, features: dict[str, Tensor]) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise RecipeError(
                    f'distill.{self.owner}_taps: "{path}" gives {type(output).__name__}, not a tensor',
                    allowed="a tap is a module whose forward returns one tensor",
                    fix="tap a module inside of it",
                    key=f"distill.{self.owner}_taps",
                )
            features[path] = output.float()

        return keep

    def probe(self, network: nn.Module, example: Tensor) -> dict[str, Tensor]:
        """What the taps give for images [B, C, H, W], without gradient and without a trace in the network.

        Raises RecipeError when a tapped module takes no part in computing the logits.
        """
        was_training = network.training
        network.eval()
        with torch.no_grad(), self.recording() as features:
            answer(network, example, self.owner)
        network.train(was_training)
        for path in self.paths:
            if path not in features:
                raise RecipeError(
                    f'distill.{self.owner}_taps: "{path}" is not used by the {self.owner}\'s forward',
                    allowed="a tap is a module that is called on the way from the images to the logits",
                    fix="tap a module before or after it, or one that holds it",
                    key=f"distill.{self.owner}_taps",
                )
        return features


NO_TAPS = Taps(nn.Module(), (), "student")


def answer(network: nn.Module, x: Tensor, owner: Owner) -> Tensor:
    """The network's logits for x [B, C, H, W]. Raises RecipeError when it fails on images of this size."""
    try:
        logits: Tensor = network(x)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise RecipeError(
            f"the {owner} fails on images of {'x'.join(map(str, x.shape[1:]))}: {(str(error).splitlines() or [''])[0]}",
            allowed="expected: teacher and student that take the same images, those of the data",
            fix=f"use a {owner} that was made for images of this size",
            key=owner,
        ) from error
    return logits


def default_taps(network: nn.Module, place: Place, owner: Owner) -> list[str]:
    """Where edgekd's own networks are tapped: `maps` at the ends of the stages, the `embedding` before the logits; an
    ensemble in its first member, a sensor in its network.

    Raises RecipeError for any other network, and for a U-Net's embedding, which it has not: its owner has to say.
    """
    if paths := member_paths(network):
        first, *_ = paths
        return [f"{first}.{path}" for path in default_taps(network.get_submodule(first), place, owner)]
    if isinstance(network, Sensor):
        return [f"network.{path}" for path in default_taps(network.network, place, owner)]
    if isinstance(network, CifarResNet | WideResNet):
        return ["pool"] if place == "embedding" else [f"stages.{number}" for number in range(len(network.stages))]
    if isinstance(network, UNet) and place == "maps":
        return [f"encoder.{number}" for number in range(len(network.encoder))]
    if isinstance(network, MobileNetV2):
        return ["pool"] if place == "embedding" else _ends_of_stages(network)
    parts = dict(network.named_children())
    if isinstance(network, nn.Sequential) and parts.keys() == {"features", "classifier"}:
        if place == "embedding":
            return [f"classifier.{len(list(parts['classifier'].children())) - 3}"]  # before dropout and logits
        pools = parts["features"].named_children()
        return [f"features.{number}" for number, module in pools if isinstance(module, nn.MaxPool2d)]
    raise RecipeError(
        f"where the {owner} has its {place} is not known, and distill.{owner}_taps does not say it",
        allowed=f"its modules: {', '.join(name for name, _ in network.named_children())}, and those inside of them",
        fix=f"name modules: --set 'distill.{owner}_taps=[PATH, ...]'",
        key=f"distill.{owner}_taps",
    )


def one_tap(paths: Sequence[str] | None, network: nn.Module, owner: Owner) -> str:
    """The one path of an embedding; None is the default's. Raises RecipeError for none or several."""
    given = default_taps(network, "embedding", owner) if paths is None else paths
    if len(given) != 1:
        raise RecipeError(
            f"distill.{owner}_taps names {len(given)} modules, and the method taps one",
            allowed="expected: the path of the module whose output is the embedding",
            fix=f"name one in distill.{owner}_taps, or leave it out",
            key=f"distill.{owner}_taps",
        )
    return given[0]


def _ends_of_stages(network: MobileNetV2) -> list[str]:
    """The last block before each halving of the map, and the last of all."""
    strides = [max(max(m.stride) for m in block.modules() if isinstance(m, nn.Conv2d)) for block in network.blocks]
    ends = [number - 1 for number, stride in enumerate(strides) if stride > 1 and number] + [len(strides) - 1]
    return [f"blocks.{number}" for number in ends]
