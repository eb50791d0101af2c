"""A trained network made physically smaller, computing the same: what its weights say is not needed goes.

Channels go that nobody reads, because all weights that would read them are 0, or that are 0 whatever the image: their
filter is 0, or the scale and shift of their batch normalisation are. They go through residual additions, depthwise and
grouped convolutions, concatenations and linear heads, see `channels`. Convolutions of low rank become three smaller
ones, see `factoring`. The network stays the object that it is: modules shrink in place, under their names, and its
forward stays its own. What was done is a `Structure`, by which another network of the same making becomes as small.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from edgekd.networks.channels import Coupled, coupled_channels, is_channelwise, is_depthwise, is_mixer
from edgekd.networks.counts import probing
from edgekd.networks.factoring import factor, ranks_of

# What removing and factoring may change the logits by, as a share of the largest: sums have fewer terms.
ROUNDING = 1e-4
# A channel is taken for 0 when it is so for layers' outputs of these sizes.
SIZES = (1.0, -1.0, 1e4, -1e4)
_log = logging.getLogger(__name__)


class Cut(TypedDict):
    """The channels that a module lost, by their numbers before."""

    outputs: list[int]
    inputs: list[int]


class Structure(TypedDict, total=False):
    """How a network differs from the one that it was built as, by module path; JSON."""

    removed: dict[str, Cut]
    factored: dict[str, list[int]]


def shrink(network: nn.Module, example: Tensor) -> Structure:
    """Remove what `network` does not need, in place, and say what that was.

    example: float32 [B, C, H, W], images for one pass. Where the smaller network does not give the same logits for them
    (its forward may count on its channels) it stays as it is, and a warning is logged.
    """
    if not _may_shrink(network):
        return {}
    trial = copy.deepcopy(network)
    with probing(trial):
        expected = trial(example)
        structure: Structure = {}
        try:
            if removed := _cuts(trial, dead_channels(trial, example)):
                structure["removed"] = removed
                restructure(trial, structure)
            if factored := ranks_of(trial, example):
                structure["factored"] = factored
                restructure(trial, {"factored": factored})
            same = bool((trial(example) - expected).abs().max() <= ROUNDING * expected.abs().max())
        except (RuntimeError, ValueError, IndexError) as error:
            _log.debug("the smaller network fails", exc_info=error)
            same = False
    if not same:
        _log.warning("the network keeps channels that it does not need: its forward counts on them")
        return {}
    restructure(network, structure)
    return structure


def restructure(network: nn.Module, structure: Structure) -> None:
    """Make a network that was built as another one was as small as that one became; its weights follow."""
    modules = dict(network.named_modules())
    for path, cut in structure.get("removed", {}).items():
        _remove(modules[path], set(cut["outputs"]), set(cut["inputs"]))
    for path, (inner_inputs, inner_outputs) in structure.get("factored", {}).items():
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, factor(modules[path], inner_inputs, inner_outputs))


def dead_channels(network: nn.Module, example: Tensor) -> list[Coupled]:
    """The channels that can go, at least one of each layer being left."""
    work = copy.deepcopy(network).eval()
    modules = dict(work.named_modules())
    left = coupled_channels(work, example)
    dead: list[Coupled] = []
    while True:
        zero = _zero_inputs(work, example)
        found = [group for group in left if _is_unread(group, modules, zero)]
        if not found:
            return _leaving_one(dead, modules)
        for group in found:
            _silence(group, modules)  # what fed it alone is not read any more either
        dead += found
        gone = {id(group) for group in found}
        left = [group for group in left if id(group) not in gone]


def _may_shrink(network: nn.Module) -> bool:
    """Whether some weight is 0 for a whole channel, or a convolution has a low rank: most networks are told at once."""
    for module in network.modules():
        if is_mixer(module) or is_channelwise(module):
            weight = _weight(module)
            rows = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
            columns = weight.transpose(0, 1).flatten(1) if weight.ndim > 1 else rows
            if not rows.any(1).all() or not columns.any(1).all():
                return True
    return bool(ranks_of(network, None))


def _is_unread(group: Coupled, modules: Mapping[str, nn.Module], zero: Mapping[str, Tensor]) -> bool:
    for path, numbers in group.inputs.items():
        module = modules[path]
        if is_depthwise(module):
            continue  # it hands the channel on to others that are in the group too
        for number in numbers:
            if not zero[path][number] and _column(module, number).any():
                return False
    return True


def _weight(module: nn.Module) -> Tensor:
    """The weight of a layer, without its history."""
    assert isinstance(module.weight, Tensor)
    return module.weight.detach()


def _column(module: nn.Module, number: int) -> Tensor:
    """The weights that read an input channel."""
    weight = _weight(module)
    if isinstance(module, _ConvNd) and module.groups > 1:
        each, rows = module.in_channels // module.groups, module.out_channels // module.groups
        group, number = divmod(number, each)
        weight = weight[group * rows : (group + 1) * rows]
    return weight[:, number]


def _silence(group: Coupled, modules: Mapping[str, nn.Module]) -> None:
    with torch.no_grad():
        for path, numbers in group.outputs.items():
            for parameter in modules[path].parameters(recurse=False):
                parameter[numbers] = 0


def _zero_inputs(network: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """By layer: which of its input channels, bool [C], are 0 whatever the layers before it compute."""
    zero: dict[str, Tensor] = {}
    dead_rows = {
        path: ~_weight(module).flatten(1).any(1) for path, module in network.named_modules() if is_mixer(module)
    }

    def before(path: str) -> Any:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0] if isinstance(module, nn.Linear) else inputs[0].movedim(1, -1)
            now = ~x.flatten(0, -2).any(0)
            zero[path] = zero[path] & now if path in zero else now

        return see

    def after(path: str, size: float) -> Any:
        def noise(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            dim = -1 if isinstance(module, nn.Linear) else 1
            values = size * torch.rand(output.shape, generator=generator).add(0.5).to(output)
            # A filter without weights gives its bias whatever it reads, and so does one that reads nothing else but 0.
            known = dead_rows[path]
            if is_depthwise(module):
                silent = ~inputs[0].movedim(1, -1).flatten(0, -2).any(0)
                known = known | silent.repeat_interleave(len(known) // len(silent))
            values.movedim(dim, -1)[..., known] = output.movedim(dim, -1)[..., known]
            return values

        return noise

    for size in SIZES:
        generator = torch.Generator().manual_seed(0)
        hooks = []
        for path, module in network.named_modules():
            if is_mixer(module):
                hooks.append(module.register_forward_pre_hook(before(path)))
                hooks.append(module.register_forward_hook(after(path, size)))
        with probing(network):
            network(example[:1])
        for hook in hooks:
            hook.remove()
    return zero


def _leaving_one(dead: Iterable[Coupled], modules: Mapping[str, nn.Module]) -> list[Coupled]:
    """The groups, without those whose loss would leave a layer without a channel."""
    lost: dict[str, int] = defaultdict(int)
    kept = []
    for group in dead:
        if all(lost[path] + len(numbers) < _outputs(modules[path]) for path, numbers in group.outputs.items()):
            kept.append(group)
            for path, numbers in group.outputs.items():
                lost[path] += len(numbers)
    return kept


def _outputs(module: nn.Module) -> int:
    return len(_weight(module))


def _cuts(network: nn.Module, dead: Iterable[Coupled]) -> dict[str, Cut]:
    cuts: dict[str, Cut] = {}
    for group in dead:
        for path, numbers in group.outputs.items():
            cuts.setdefault(path, {"outputs": [], "inputs": []})["outputs"].extend(numbers)
        for path, numbers in group.inputs.items():
            cuts.setdefault(path, {"outputs": [], "inputs": []})["inputs"].extend(numbers)
    return {path: {"outputs": sorted(cut["outputs"]), "inputs": sorted(cut["inputs"])} for path, cut in cuts.items()}


def _remove(module: nn.Module, outputs: set[int], inputs: set[int]) -> None:
    """Take channels out of a module's parameters and statistics, and correct what it says of itself."""
    kept = _left(_outputs(module), outputs)
    for name in ("weight", "bias", "running_mean", "running_var"):
        _select(module, name, 0, kept)
    if isinstance(module, _BatchNorm):
        module.num_features = len(kept)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(kept)
    elif isinstance(module, nn.Linear):
        _select(module, "weight", 1, _left(module.in_features, inputs))
        module.in_features, module.out_features = module.weight.shape[1], len(kept)
    elif isinstance(module, _ConvNd):
        remaining = _left(module.in_channels, inputs)
        if is_depthwise(module):
            module.groups = len(remaining)
        else:  # groups lose the same of each
            each = module.in_channels // module.groups
            _select(module, "weight", 1, [number for number in remaining if number < each])
        module.in_channels, module.out_channels = len(remaining), len(kept)


def _left(count: int, removed: set[int]) -> list[int]:
    return [number for number in range(count) if number not in removed]


def _select(module: nn.Module, name: str, dim: int, kept: list[int]) -> None:
    old = getattr(module, name, None)
    if old is None:
        return
    index = torch.tensor(kept, dtype=torch.long, device=old.device)
    new = old.detach().index_select(dim, index)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(module, name, new)
