"""Other activations for any network: modules, and calls such as `F.relu(x)` where torch.fx can trace them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from edgekd import registry
from edgekd.networks.counts import probing
from edgekd.networks.rewriting import FUNCTIONS, FunctionalActivation, UntraceableError, function_name, rewrite

# Hidden activations. Sigmoid, tanh, softmax and their hard forms are left out: in a network they are gates and outputs.
MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Mish, nn.GELU,
    nn.Hardswish, FunctionalActivation,
)  # fmt: skip


@dataclass
class SwapReport:
    """Names of the activations that were swapped, and of those that were left, each with the reason."""

    swapped: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def swap_activations(network: nn.Module, name: str, options: Mapping[str, Any], example: Tensor) -> SwapReport:
    """Replace every activation of `network` in place by the registered activation `name`, one module per call.

    `example` is a batch [B,C,H,W] for one forward pass in evaluation mode, which finds out what is called, where, and
    with how many channels: dimension 1, or the last one behind a linear layer. Activations called as functions, modules
    called several times in one forward and modules that work in place on a tensor used again need the forward of the
    module around them rewritten by torch.fx; where that cannot trace it they stay and are named in the report. All
    other modules, their names in the state dict and their modes stay.
    Raises RecipeError for an unknown activation or option.
    """
    registry.entry("activation", name).validate(options, "activation")
    report = SwapReport()
    _unshare(network)
    before, calls = observe(network, example)
    taken: set[nn.Module] = set()
    for owner, unreachable in _owners_to_rewrite(network, example, before, calls).items():
        reason = _try_rewrite(network, owner, calls, example, before, taken)
        if reason:
            report.left |= dict.fromkeys(_names(network, owner, unreachable), reason)
    _, calls = observe(network, example)
    for path, parent, key, activation in list(_places(network)):
        inputs = {call.channels for call in calls.activations if call.module is activation}
        if path in report.left:
            continue
        if len(inputs) != 1:
            counts = " and ".join(str(channels.number) for channels in sorted(inputs))
            report.left[path] = f"is called with {counts} channels" if inputs else "the probe never called it"
            continue
        channels = inputs.pop()
        made = registry.create("activation", name, channels.number, options=options, where="activation")
        made = OfLastDimension(made) if channels.last else made
        parent.add_module(key, made.to(example.device).train(activation.training))
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # or its fast path computes a ReLU whatever module is there
        report.swapped.append(path)
    return report


class OfLastDimension(nn.Module):
    """An activation for maps with the channels last, as linear layers of transformers make them: [B,...,D]."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The activation of x, its last dimension taken for the channels."""
        out: Tensor = self.activation(x.movedim(-1, 1))
        return out.movedim(1, -1)


class Channels(NamedTuple):
    """The number of channels that an activation gets, and whether they are the last of more than two dimensions."""

    number: int
    last: bool


@dataclass(frozen=True)
class Call:
    """One call of an activation in a forward pass."""

    owner: nn.Module
    module: nn.Module | None  # None: called as a function
    name: str
    channels: Channels


@dataclass
class Calls:
    """What one forward pass called: its activations in order, and how often and with what each module was called."""

    activations: list[Call] = field(default_factory=list)
    arguments: dict[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(
        default_factory=lambda: defaultdict(list)
    )


def observe(network: nn.Module, example: Tensor) -> tuple[list[Any], Calls]:
    """The leaves of the output in evaluation mode, and the calls of the pass that gave it."""
    calls = Calls()
    with probing(network), torch.random.fork_rng(devices=[]), _recording(network, calls):
        torch.default_generator.manual_seed(0)
        return pytree.tree_leaves(network(example.clone())), calls


@contextmanager
def _recording(network: nn.Module, calls: Calls) -> Iterator[None]:
    stack: list[nn.Module] = []
    linear_outputs: list[Tensor] = []  # kept alive so that no other tensor can be taken for one of them

    def note(module: nn.Module | None, name: str, x: Tensor) -> None:
        last = x.ndim > 2 and any(x is out for out in linear_outputs)
        count = x.shape[-1 if last else 1] if x.ndim > 1 else 1
        calls.activations.append(Call(stack[-1], module, name, Channels(int(count), last)))

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(module, MODULES) and stack:
            note(module, type(module).__name__, args[0] if args else kwargs["input"])
        calls.arguments[module].append((args, kwargs))
        stack.append(module)

    def leave(module: nn.Module, _: Any, out: Any) -> None:
        stack.pop()
        if isinstance(module, nn.Linear):
            linear_outputs.append(out)

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in FUNCTIONS and stack and not isinstance(stack[-1], MODULES):
                note(None, function_name(func), args[0] if args else kwargs["input"])
            return func(*args, **(kwargs or {}))

    hooks = []
    for module in network.modules():
        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        hooks.append(module.register_forward_hook(leave))
    try:
        with Functions():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _places(network: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every place in the module tree with an activation: its path, the module around it, its key there, itself."""
    for path, parent in network.named_modules():
        for key, child in parent.named_children():
            if isinstance(child, MODULES):
                yield f"{path}.{key}".lstrip("."), parent, key, child


def _unshare(network: nn.Module) -> None:
    """One activation object in several places becomes one per place, as each place gets parameters of its own."""
    seen = set()
    for parent in network.modules():
        for key, child in parent._modules.items():
            if isinstance(child, MODULES):
                if child in seen:
                    parent._modules[key] = child = deepcopy(child)
                seen.add(child)


def _owners_to_rewrite(
    network: nn.Module, example: Tensor, before: list[Any], calls: Calls
) -> dict[nn.Module, list[Call]]:
    """Modules whose forward must be rewritten, with the activations there that replacing a module does not reach."""
    times = Counter((call.module, call.owner) for call in calls.activations)
    callers = Counter(module for module, _ in times)
    aliasing = _aliasing(network, example, before)
    owners: dict[nn.Module, list[Call]] = {}
    for call in calls.activations:
        again = times[call.module, call.owner] > len(calls.arguments[call.owner]) or callers[call.module] > 1
        if call.module is None or again or call.module in aliasing:
            owners.setdefault(call.owner, []).append(call)
    return owners


def _aliasing(network: nn.Module, example: Tensor, before: list[Any]) -> set[nn.Module]:
    """Activations that change in place a tensor that is used again: out of place, the outputs would be others."""

    def matter(modules: list[nn.Module]) -> bool:
        for module in modules:
            module.inplace = False  # type: ignore[assignment]
        changed = not same(before, observe(network, example)[0])
        for module in modules:
            module.inplace = True  # type: ignore[assignment]
        return changed

    inplace = [module for *_, module in _places(network) if getattr(module, "inplace", False)]
    return {module for module in inplace if matter([module])} or set(inplace) if matter(inplace) else set()


def same(left: list[Any], right: list[Any]) -> bool:
    """Whether two flattened outputs are equal to the bit."""
    return len(left) == len(right) and all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) if isinstance(a, Tensor) else a == b
        for a, b in zip(left, right, strict=True)
    )


def _try_rewrite(
    network: nn.Module, owner: nn.Module, calls: Calls, example: Tensor, before: list[Any], taken: set[nn.Module]
) -> str:
    """Give every activation call of `owner` a module of its own. Where that cannot be: change nothing, say why."""
    try:
        undo = rewrite(owner, calls.arguments[owner][0], MODULES, taken)
    except UntraceableError as error:
        return str(error)
    try:
        unchanged = same(before, observe(network, example)[0])
    except Exception:  # a trace can also compute something that fails
        unchanged = False
    if unchanged:
        return ""
    undo()
    return "its forward computes something else when it is traced by torch.fx"


def _names(network: nn.Module, owner: nn.Module, calls: list[Call]) -> list[str]:
    """Paths of activation modules; a function is named by the path of its caller, as in `layer1.relu()`."""
    paths = {module: path for path, module in network.named_modules()}
    return [
        paths[call.module] if call.module is not None else f"{paths[owner]}.{call.name}()".lstrip(".") for call in calls
    ]
