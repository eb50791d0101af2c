"""Networks from elsewhere: timm, torchvision, and the user's own `module:callable`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgekd.errors import EdgekdError, MissingError, RecipeError, unknown

if TYPE_CHECKING:
    from edgekd.data import Shape

OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def foreign_network(name: str, options: Mapping[str, Any], shape: Shape, num_classes: int) -> nn.Module:
    """The network that `timm:NAME`, `torchvision:NAME` or `module:callable` makes.

    Raises RecipeError when it cannot be made so, MissingError when timm or torchvision is absent or broken.
    """
    source, _, rest = name.partition(":")
    make = {"timm": _timm, "torchvision": _torchvision}.get(source)
    try:
        network = make(rest, options, shape, num_classes) if make else _own(name, options, shape, num_classes)
    except EdgekdError:
        raise
    except Exception as error:  # what a stranger's code raises can be anything
        raise RecipeError(
            f'network "{name}" cannot be built: {_reason(error)}',
            allowed=f"given: options {dict(options)}, {shape}, {num_classes} classes",
            fix=f"look at what {rest} takes, and set its options accordingly",
        ) from error
    if not isinstance(network, nn.Module):
        raise RecipeError(
            f'network "{name}" gives {type(network).__name__}',
            allowed="needed: a torch.nn.Module",
            fix="make the callable return the network",
        )
    return network


def _timm(name: str, options: Mapping[str, Any], shape: Shape, num_classes: int) -> Any:
    timm = _library("timm")
    if not timm.is_model(name):
        raise _no_such("timm", name, timm.list_models())
    return timm.create_model(name, **{"num_classes": num_classes, "in_chans": shape.channels, **options})


def _torchvision(name: str, options: Mapping[str, Any], shape: Shape, num_classes: int) -> Any:
    del shape  # torchvision's networks take 3 channels; on other data the check of the logits says so
    models = _library("torchvision.models")
    if name not in models.list_models(models):
        raise _no_such("torchvision", name, models.list_models(models))
    return models.get_model(name, **{"num_classes": num_classes, **options})


def _no_such(library: str, name: str, known: list[str]) -> RecipeError:
    """The error for a name that a library does not have; it has too many to list them all."""
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
    return RecipeError(
        f'network = "{library}:{name}" is not a network of {library}',
        allowed=f"closest: {', '.join(f'{library}:{other}' for other in close) or 'none'}",
        fix=f"correct the name; the documentation of {library} lists its networks",
    )


def _library(module: str) -> ModuleType:
    """Import an optional library; torchvision in particular breaks when it was built for another torch."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        what = "which is not installed" if absent else f"which does not import: {_reason(error)}"
        raise MissingError(
            f"this network needs the Python package {package!r}, {what}",
            allowed="edgekd does not bring it, as its build must match that of torch",
            fix=f"pip install --upgrade {package}; torchvision must be the build for torch {torch.__version__}",
        ) from error


def _own(name: str, options: Mapping[str, Any], shape: Shape, num_classes: int) -> Any:
    """Call the user's callable with what its signature takes of what edgekd knows, and with the options."""
    call = _own_callable(name)
    signature = inspect.signature(call)
    side = shape.height if shape.height == shape.width else (shape.height, shape.width)
    known = {"shape": shape, "num_classes": num_classes, "in_channels": shape.channels, "image_size": side}
    given = {**{key: value for key, value in known.items() if key in signature.parameters}, **options}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise RecipeError(
            f'network "{name}" cannot be called: {error}',
            allowed=f"its parameters: {signature}; edgekd gives those named {', '.join(known)}",
            fix="set the others as options of the network",
        ) from None
    return call(**given)


def _own_callable(name: str) -> Callable[..., Any]:
    path, _, attribute = name.partition(":")
    if not OWN.fullmatch(name) or path.partition(".")[0] in sys.stdlib_module_names:
        raise RecipeError(
            f'network = "{name}" does not name a callable that makes a network',
            allowed="allowed: package.module:callable of your own, timm:NAME, torchvision:NAME, or a registered name",
            fix="see: edgekd list networks",
        )
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # a console script's path lacks the folder that it is started in
    try:
        module = importlib.import_module(path)
    except Exception as error:
        raise RecipeError(
            f'network "{name}": the module {path!r} does not import: {_reason(error)}',
            allowed=f"looked in {here} and in the installed packages",
            fix="start edgekd in the folder that holds it, or add that folder to PYTHONPATH",
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown(
            "network", name, [f"{path}:{key}" for key in public], noun=f"callable of {path}", fix="correct the name"
        )
    return found  # type: ignore[no-any-return]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
