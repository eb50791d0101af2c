"""Which channels of a network can only come and go together, whatever its forward does with them.

A channel of a convolution ends where other layers read it: after additions it is in several layers' outputs at once,
after a concatenation at another place, after `flatten` at many. This is found by trying instead of by reading code:
every layer's output is replaced by noise in which some channels are changed, and whoever reads a change reads those
channels. Channel i is changed in the samples of the batch that spell i in binary, and in those that spell what is not
in i: a place that reads one channel tells which, and a place that mixes several shows that it does.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from edgekd.networks.counts import probing

Mixer = _ConvNd | nn.Linear
# Positive, so that it passes a ReLU; below 1, so that no clipping meets it.
LOW, HIGH, CHANGE = 0.2, 0.4, 0.4
_FIXED = ("", "", 0)
_Place = tuple[str, str, int]  # `out` or `in`, a module's path, the channel's number there


@dataclass
class Coupled:
    """Channels that come and go together: by module, their numbers among its outputs and its inputs.

    A batch normalisation has them among its outputs.
    """

    outputs: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    inputs: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))


def is_mixer(module: nn.Module) -> bool:
    """Whether the module's outputs are sums over its input channels: convolutions and linear layers."""
    return isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd)


def is_depthwise(module: nn.Module) -> bool:
    """Whether each of the module's input channels has output channels of its own."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


def is_channelwise(module: nn.Module) -> bool:
    """Whether the module has parameters for each channel, and mixes none."""
    return isinstance(module, _BatchNorm) or (isinstance(module, nn.PReLU) and module.num_parameters > 1)


def coupled_channels(network: nn.Module, example: Tensor) -> list[Coupled]:
    """All channels of `network` but those that are given or wanted from outside, each in one group with its like.

    example: float32 [B, C, H, W]. Channels are left out that a module with parameters of its own reads and that is none
    of convolution, linear layer, batch normalisation and PReLU, unless it computes the same without the last of them.
    """
    probe = _Probe(network, example)
    union = _Union()
    for place in probe.read_images():
        union.join(_FIXED, place)
    for path in probe.sources:
        for places in probe.followed(path):
            union.join(*places)
    for path, module in probe.sources.items():
        for first, second in _tied(path, module):
            union.join(first, second)
    return _groups(union, probe)


def _groups(union: _Union, probe: _Probe) -> list[Coupled]:
    groups: dict[_Place, Coupled] = defaultdict(Coupled)
    fixed = union.root(_FIXED)
    for place in sorted(union.places()):
        if (root := union.root(place)) != fixed:
            side, path, number = place
            # What a batch normalisation reads, it gives.
            outputs = side == "out" or is_channelwise(probe.modules[path])
            (groups[root].outputs if outputs else groups[root].inputs)[path].append(number)
    return [group for group in groups.values() if any(path in probe.sources for path in group.outputs)]


def _tied(path: str, module: nn.Module) -> Iterator[tuple[_Place, _Place]]:
    """Places of a convolution in groups that can only go together: its groups stay alike."""
    if not isinstance(module, _ConvNd) or module.groups == 1:
        return
    if is_depthwise(module):
        multiplier = module.out_channels // module.in_channels
        for number in range(module.out_channels):
            yield ("out", path, number), ("in", path, number // multiplier)
        return
    for side, channels in (("out", module.out_channels), ("in", module.in_channels)):
        each = channels // module.groups
        for number in range(each, channels):
            yield (side, path, number), (side, path, number % each)


class _Union:
    """Places in disjoint sets (Galler and Fischer, 1964)."""

    def __init__(self) -> None:
        self._above: dict[_Place, _Place] = {}

    def root(self, place: _Place) -> _Place:
        above = self._above
        above.setdefault(place, place)
        while above[place] != place:
            above[place] = place = above[above[place]]
        return place

    def join(self, *places: _Place) -> None:
        for first, second in itertools.pairwise(places):
            self._above[self.root(second)] = self.root(first)

    def places(self) -> list[_Place]:
        return [place for place in self._above if place != _FIXED]


class _Probe:
    """A network whose layers give noise, and whose readers are watched."""

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        self.network, self.example = network, example[:1]
        self.modules = dict(network.named_modules())
        self._shapes: dict[str, list[torch.Size]] = defaultdict(list)
        self._opaque: set[str] = set()
        self._look()
        self.sources = {path: self.modules[path] for path in self._shapes}

    def _look(self) -> None:
        """One real pass: which layers are called, what they give, and which modules cannot do with fewer channels."""

        def watch(path: str) -> Any:
            def see(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                if is_mixer(module):
                    self._shapes[path].append(output.shape)
                elif not is_channelwise(module) and not _works_with_fewer(module, inputs, output):
                    self._opaque.add(path)

            return see

        hooks = [module.register_forward_hook(watch(path)) for path, module in self.modules.items() if _has_own(module)]
        try:
            with probing(self.network):
                self.network(self.example)
        finally:
            for hook in hooks:
                hook.remove()

    def read_images(self) -> list[_Place]:
        """The places that read the images."""
        changed = torch.cat([self.example, self.example + CHANGE])
        codes = torch.zeros(2, 1, dtype=torch.bool)
        codes[1] = True
        return [place for place, _ in self._read(changed, "", codes)]

    def followed(self, path: str) -> Iterator[list[_Place]]:
        """For each place that channels of this layer reach: it and them."""
        channels = self._channels(path)
        bits = max(1, (channels - 1).bit_length())
        numbers = torch.arange(channels)
        digits = torch.stack([(numbers >> bit) & 1 for bit in range(bits)]).bool()
        codes = torch.cat([torch.zeros(1, channels, dtype=torch.bool), digits, ~digits])
        for number in range(channels):
            yield [("out", path, number)]
        for place, code in self._read(self.example.expand(len(codes), *self.example.shape[1:]), path, codes):
            ones, zeros = code[1 : bits + 1], code[bits + 1 :]
            if all(one != zero for one, zero in zip(ones, zeros, strict=True)):
                yield [place, ("out", path, sum(one << bit for bit, one in enumerate(ones)))]
            else:
                yield [place, *(("out", path, number) for number in range(channels))]

    def _channels(self, path: str) -> int:
        module = self.modules[path]
        return module.out_features if isinstance(module, nn.Linear) else int(module.out_channels)  # type: ignore[arg-type]

    def _read(self, images: Tensor, path: str, codes: Tensor) -> list[tuple[_Place, list[bool]]]:
        """The places that read something else in some of the S samples than in the first, and in which.

        codes: bool [S, K], in which samples which channels of the layer at `path` are changed.
        """
        read: list[tuple[_Place, list[bool]]] = []

        def note(place: str, x: Any, dim: int, side: str = "in") -> None:
            x = x.reshape(len(images), -1, *x.shape[1:]) if x.shape[0] != len(images) else x.unsqueeze(1)
            changed = (x != x[:1]).movedim(dim if dim < 0 else dim + 1, -1).flatten(1, -2).any(1)
            for number in changed.any(0).nonzero()[:, 0].tolist():
                read.append((_FIXED if side == "fixed" else (side, place, number), changed[:, number].tolist()))

        with self._replaced(len(images), path, codes, note):
            leaves = pytree.tree_leaves(self.network(images))
        for leaf in leaves:
            note("", leaf.reshape(len(images), -1), 1, "fixed")
        return read

    @contextmanager
    def _replaced(self, samples: int, changed: str, codes: Tensor, note: Any) -> Iterator[None]:
        """Layers give noise, batch normalisation what it gets; both tell what they read."""
        calls: dict[str, int] = defaultdict(int)

        def noise(path: str, module: nn.Module) -> Any:
            def forward(x: Tensor) -> Tensor:
                dim = -1 if isinstance(module, nn.Linear) else 1
                note(path, x, dim)
                shapes = self._shapes[path]
                shape = shapes[calls[path] % len(shapes)]
                calls[path] += 1
                rows = samples * shape[0] // len(self.example)
                generator = torch.Generator().manual_seed(len(path) + calls[path])
                values = LOW + (HIGH - LOW) * torch.rand(shape[1:], generator=generator).to(x)
                values = values.expand(rows, *shape[1:])
                if path == changed:
                    of_rows = codes.to(x).repeat_interleave(rows // samples, 0)
                    wide = [1] * len(shape)
                    wide[0], wide[dim] = of_rows.shape
                    values = values + CHANGE * of_rows.view(wide)
                return values

            return forward

        def same(path: str) -> Any:
            def forward(x: Tensor) -> Tensor:
                note(path, x, 1)
                return x

            return forward

        def opaque(path: str) -> Any:
            def see(module: nn.Module, inputs: Any, output: Any) -> None:
                for x in pytree.tree_leaves((inputs, output)):
                    if isinstance(x, Tensor) and x.ndim > 1:
                        note(path, x.reshape(samples, -1), 1, "fixed")

            return see

        replaced = {path: noise(path, module) for path, module in self.sources.items()}
        replaced |= {path: same(path) for path, module in self.modules.items() if isinstance(module, _BatchNorm)}
        hooks = [self.modules[path].register_forward_hook(opaque(path)) for path in self._opaque]
        hooks += [
            module.register_forward_pre_hook(lambda _, x, path=path: note(path, x[0], 1))
            for path, module in self.modules.items()
            if is_channelwise(module) and path not in replaced
        ]
        try:
            for path, forward in replaced.items():
                self.modules[path].forward = forward  # type: ignore[method-assign]
            with probing(self.network):
                yield
        finally:
            for path in replaced:
                del self.modules[path].forward
            for hook in hooks:
                hook.remove()


def _has_own(module: nn.Module) -> bool:
    own = itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return any(True for _ in own)


def _works_with_fewer(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> bool:
    """Whether a module computes the same of all channels but the last one when it gets no last one."""
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].ndim < 2 or inputs[0].shape[1] < 2:
        return False
    forward = type(module).forward
    try:
        fewer = forward(module, inputs[0][:, :-1])
    except (RuntimeError, ValueError, IndexError):
        return False
    return isinstance(output, Tensor) and output.shape == inputs[0].shape and bool(torch.equal(fewer, output[:, :-1]))
