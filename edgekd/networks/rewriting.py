"""A module's forward rewritten by torch.fx so that every activation call becomes a module of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

NAMES = (
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "silu", "mish", "gelu", "hardswish",
)  # fmt: skip
SPELLINGS = (*NAMES, *(f"{name}_" for name in NAMES))
FUNCTIONS = {getattr(place, name) for place in (torch, F, Tensor) for name in SPELLINGS if hasattr(place, name)}


class UntraceableError(Exception):
    """The forward cannot be rewritten; the text says why."""


class FunctionalActivation(nn.Module):
    """An activation that was called as a function, as a module: the same function with the same further arguments."""

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.args, self.kwargs = name, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        """The function of x, never in place."""
        out: Tensor = getattr(F, self.name)(x, *self.args, **self.kwargs)
        return out


def function_name(function: Any) -> str:
    """`relu` for F.relu, torch.relu, Tensor.relu_ and so on; fx calls a method by its bare name."""
    return _spelled(function).removesuffix("_")


def _spelled(function: Any) -> str:
    return function if isinstance(function, str) else str(function.__name__)


def rewrite(
    owner: nn.Module,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    kinds: tuple[type[nn.Module], ...],
    taken: set[nn.Module],
) -> Callable[[], None]:
    """Rewrite `owner.forward` so that each call of an activation is a call of its own, out-of-place module.

    The object stays, with all its modules, buffers and methods: it becomes an instance of a subclass of its class.
    `arguments` are positional and keyword arguments that it is called with, `kinds` the classes of activations, `taken`
    the modules that serve a call already: their next call gets a copy. Returns what takes the change back.
    Raises UntraceableError, with `owner` unchanged.
    """
    class_, keys = owner.__class__, set(owner._modules)
    inplace: list[nn.Module] = []
    mine: set[nn.Module] = set()

    def undo() -> None:
        owner.__class__ = class_
        for key in owner._modules.keys() - keys:
            delattr(owner, key)
        for module in inplace:
            module.inplace = True  # type: ignore[assignment]
        taken.difference_update(mine)

    graph = _trace(owner, arguments)
    try:
        for node in list(graph.nodes):
            if node.op == "call_module" and isinstance(module := owner.get_submodule(str(node.target)), kinds):
                if getattr(module, "inplace", False):
                    module.inplace = False  # type: ignore[assignment]
                    inplace.append(module)
                    _pass_on(graph, node)
                if module in taken:
                    node.target = _add(owner, str(node.target).replace(".", "_"), deepcopy(module))
                else:
                    mine.add(module)
                    taken.add(module)
            elif _calls_function(node):
                _as_module(owner, graph, node)
        graph.lint()
        forward = type(fx.GraphModule(owner, graph)).forward
    except UntraceableError:
        undo()
        raise
    owner.__class__ = type(class_.__name__, (class_,), {"forward": forward, "__module__": class_.__module__})
    return undo


def _calls_function(node: fx.Node) -> bool:
    return (node.op == "call_function" and node.target in FUNCTIONS) or (
        node.op == "call_method" and node.target in SPELLINGS
    )


def _as_module(owner: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    """Turn the call of an activation function into the call of a module."""
    args, kwargs = list(node.args), dict(node.kwargs)
    x = args.pop(0) if args else kwargs.pop("input")
    if not isinstance(x, fx.Node) or any(isinstance(value, fx.Node) for value in (*args, *kwargs.values())):
        raise UntraceableError(f"calls {function_name(node.target)} with arguments that are computed")
    # The only argument of these functions that can be True is `inplace`.
    if _spelled(node.target).endswith("_") or any(value is True for value in (*args, *kwargs.values())):
        _pass_on(graph, node)
    module = FunctionalActivation(
        function_name(node.target),
        tuple(value for value in args if not isinstance(value, bool)),
        {key: value for key, value in kwargs.items() if not isinstance(value, bool)},
    )
    node.target = _add(owner, node.name.removesuffix("_"), module)
    node.op, node.args, node.kwargs = "call_module", (x,), {}


def _pass_on(graph: fx.Graph, node: fx.Node) -> None:
    """What reads the tensor after it was changed in place must read the new tensor once nothing works in place."""
    order = {other: index for index, other in enumerate(graph.nodes)}
    x = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(x, fx.Node)
    for user in list(x.users):
        if order[user] > order[node]:
            user.replace_input_with(x, node)


def _add(owner: nn.Module, name: str, module: nn.Module) -> str:
    """Add a module under a name that is still free."""
    number, free = 1, name
    while hasattr(owner, free):
        number, free = number + 1, f"{name}_{number}"
    owner.add_module(free, module.train(owner.training))
    return free


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(owner: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> fx.Graph:
    """The graph of `owner.forward` for both modes: `self.training` stays a question that is asked at each call.

    Parameters of forward that the probe did not pass keep their defaults.
    """
    signature = inspect.signature(owner.forward)
    passed = signature.bind(*arguments[0], **arguments[1]).arguments
    absent = {
        key: parameter.default
        for key, parameter in signature.parameters.items()
        if key not in passed and parameter.default is not parameter.empty
    }
    before, mode = dict(owner.__dict__), owner.training
    graphs = []
    try:
        for training in (True, False):
            owner.training = training
            graphs.append(_ChildrenAreLeaves().trace(owner, absent))
    except Exception as error:  # whatever a stranger's forward raises when it is given a proxy
        raise UntraceableError(f"torch.fx cannot trace its forward: {_first_line(error)}") from error
    finally:
        owner.training = mode
        changed = [key for key, value in owner.__dict__.items() if key not in before or before[key] is not value]
        for key in changed:
            if key in before:
                owner.__dict__[key] = before[key]
            else:
                del owner.__dict__[key]
    if changed:
        raise UntraceableError("its forward keeps state or makes tensors of its own, which torch.fx would freeze")
    return _merged(*graphs)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _merged(training: fx.Graph, evaluation: fx.Graph) -> fx.Graph:
    """One graph from those of the two modes, which may differ in arguments that are the value of `self.training`."""
    same = dict(zip(list(training.nodes), list(evaluation.nodes), strict=False))
    different = "its forward is another one in training"
    if len(training.nodes) != len(evaluation.nodes):
        raise UntraceableError(different)
    asked: list[fx.Node] = []

    def merge(mine: Any, theirs: Any) -> Any:
        if isinstance(mine, fx.Node):
            if same[mine] is not theirs:
                raise UntraceableError(different)
            return mine
        if isinstance(mine, tuple | list) and isinstance(theirs, tuple | list) and len(mine) == len(theirs):
            return type(mine)(merge(a, b) for a, b in zip(mine, theirs, strict=True))
        if isinstance(mine, dict) and isinstance(theirs, dict) and mine.keys() == theirs.keys():
            return {key: merge(value, theirs[key]) for key, value in mine.items()}
        if mine is True and theirs is False:
            if not asked:
                with training.inserting_before(next(iter(training.nodes))):
                    asked.append(training.create_node("get_attr", "training"))
            return asked[0]
        if type(mine) is not type(theirs) or mine != theirs:
            raise UntraceableError(different)
        return mine

    for mine, theirs in same.items():
        if (mine.op, mine.target) != (theirs.op, theirs.target):
            raise UntraceableError(different)
        mine.args, mine.kwargs = merge(mine.args, theirs.args), merge(mine.kwargs, theirs.kwargs)
    return training
