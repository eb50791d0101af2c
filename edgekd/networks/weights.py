"""Network weights in files. Written as safetensors; a torch state dict can be read too, never a pickle with code."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from edgekd.errors import CheckpointError
from edgekd.networks.slimming import Structure, restructure

# Where training scripts put the weights inside what they save, and what wrappers put before the names of weights.
NESTED = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")
SHOWN = 4
# The entry of a safetensors file's metadata that holds the facts, as JSON.
FACTS = "edgekd"


def save_weights(network: nn.Module, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write parameters and buffers as safetensors, all or nothing; `facts` become the file's metadata.

    The facts say what the weights belong to: network, options, shape, num_classes, activation; and the structure, if
    the network is smaller than what these make.
    Raises CheckpointError when the file cannot be written.
    """
    # A copy of each: safetensors refuses tensors that share memory (tied weights) or lie channels-last.
    tensors = {
        key: value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for key, value in network.state_dict().items()
    }
    # One entry: safetensors writes several in an order of its own, and the same weights would not be the same bytes.
    metadata = {FACTS: json.dumps(facts, sort_keys=True, default=str)} if facts else None
    content = safetensors.torch.save(tensors, metadata)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot write the weights: {error.strerror}",
            allowed="the file is written whole or not at all",
            fix="free some space there, or choose a folder that you may write to",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def load_weights(network: nn.Module, path: Path) -> dict[str, Any]:
    """Fill `network` with the weights in `path` (.safetensors, or a torch state dict) and return the file's facts.

    Where the facts have a `structure`, the network becomes as small as that one was: see `slimming`.
    Raises CheckpointError when the file is absent, damaged, holds code, holds NaN, or does not fit the network; the
    network is then as it was.
    """
    tensors, facts = read_weights(path)
    structure = facts.get("structure")
    if structure:
        trial = copy.deepcopy(network)
        _restructure(trial, structure, path)
        _check_fit(trial.state_dict(), tensors, path)
        restructure(network, structure)
    else:
        _check_fit(network.state_dict(), tensors, path)
    network.load_state_dict(tensors)
    return facts


def _restructure(network: nn.Module, structure: Structure, path: Path) -> None:
    try:
        restructure(network, structure)
    except (KeyError, AttributeError, RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"{path}: belongs to a network that channels were removed from, and this one is another network",
            allowed=f"removed there: channels of {', '.join([*structure.get('removed', {})][:SHOWN])}, ...",
            fix="give the network the options, classes, image size and activation that the weights were trained with",
        ) from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a file by name, on the CPU, and the facts that it was saved with. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: there is no such checkpoint file",
            allowed="allowed: .safetensors, or a torch state dict",
            fix="check the path of the checkpoint",
        )
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
                metadata = file.metadata() or {}
            # What other programs wrote is plain text.
            return _without_prefix(tensors), json.loads(metadata[FACTS]) if FACTS in metadata else metadata
        with warnings.catch_warnings(action="ignore"):  # that a newer pickle may fail: an error says so if it does
            content = torch.load(path, map_location="cpu", weights_only=True)
        return _without_prefix(_state_dict(content, path)), {}
    except pickle.UnpicklingError as error:
        if "unsupported" in str(error).lower():
            raise CheckpointError(
                f"{path}: holds more than weights: loading it would run the code in it, which edgekd never does",
                allowed="allowed: .safetensors, or a state dict saved by torch.save(network.state_dict(), path)",
                fix="save its state dict with the program that made it, if you trust that file",
            ) from error
        raise _damaged(path, "the pickle in it cannot be read") from error
    except (safetensors.SafetensorError, OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise _damaged(path, (str(error).splitlines() or [type(error).__name__])[0]) from error


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: is damaged, or is no checkpoint: {reason}",
        allowed="allowed: .safetensors, or a state dict saved by torch.save(network.state_dict(), path)",
        fix="copy the file again and compare its size with the original's",
    )


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The weights among what a training script saved."""
    while isinstance(content, Mapping) and (inner := [key for key in NESTED if isinstance(content.get(key), Mapping)]):
        content = content[inner[0]]
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        return {str(key): value for key, value in content.items()}
    raise CheckpointError(
        f"{path}: holds no state dict but {type(content).__name__}",
        allowed=f"allowed: names with tensors, or a dict that has them under {', '.join(map(repr, NESTED))}",
        fix="save it by torch.save(network.state_dict(), path)",
    )


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the bare network has them: DataParallel and torch.compile put a prefix before every one."""
    for prefix in PREFIXES * 2:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    def shape(tensor: Tensor) -> str:
        return "x".join(map(str, tensor.shape)) or "scalar"

    problems = [f"{key}: missing in the file" for key in expected if key not in found]
    problems += [f"{key}: not in the network" for key in found if key not in expected]
    problems += [
        f"{key}: {shape(found[key])} in the file, {shape(value)} in the network"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"{path}: does not fit the network in {len(problems)} of {len({*expected, *found})} tensors",
            allowed="; ".join(problems[:SHOWN]) + more,
            fix="give the network the options, classes, image size and activation that the weights were trained with",
        )
    bad = [key for key, value in found.items() if value.is_floating_point() and value.isnan().any()]
    if bad:
        raise CheckpointError(
            f"{path}: the weights hold NaN in {len(bad)} tensors",
            allowed=", ".join(bad[:SHOWN]),
            fix="use a checkpoint from before the training diverged",
        )
