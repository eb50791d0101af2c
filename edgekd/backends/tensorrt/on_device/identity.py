"""What an engine belongs to: this model, these flags, this TensorRT, this very kind of board."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

from .board import board
from .build import MODEL, PLAN, RESULT, settings_of, sha256
from .cuda import Cuda

# What makes two boards different for an engine. Even with the same chip, another number of multiprocessors means other
# kernels, and another L4T another driver.
ENVIRONMENT = ("tensorrt", "compute_capability", "multiprocessors", "device", "l4t")


def environment(version: str, root: str = "/") -> dict[str, Any]:
    """Where we are. version: of TensorRT, as its module says. Raises CudaError where there is no GPU."""
    return dict(Cuda().facts(), tensorrt=version, l4t=board(root)["l4t"])


def identity(folder: str, here: dict[str, Any]) -> dict[str, Any]:
    """The engine key of the model in a folder, for the board `here`: an engine fits where its key is equal."""
    settings = settings_of(folder)
    return dict({name: here[name] for name in ENVIRONMENT}, onnx=sha256(os.path.join(folder, MODEL)), flags=settings)


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """In what two keys differ, for people."""
    changed = [name for name in sorted(wanted) if found.get(name) != wanted[name]]
    return [
        f"{name} changed" if name in ("onnx", "flags") else f"{name} was {found.get(name)} and is {wanted[name]}"
        for name in changed
    ]


def stale(folder: str, wanted: dict[str, Any]) -> list[str]:
    """Why the engine in a folder must not be run; empty when it is the one that was built here from this model."""
    try:
        with open(os.path.join(folder, RESULT), encoding="utf-8") as file:
            built = json.load(file)
        digest = sha256(os.path.join(folder, PLAN))
    except (OSError, ValueError):
        return ["there is none"]
    if digest != built.get("files", {}).get(PLAN, [""])[0]:
        return ["its file is damaged, or was not built here"]
    return differences(built.get("identity", {}), wanted)


def ensured(
    folder: str, here: dict[str, Any], build: Callable[[str, dict[str, Any]], dict[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """build.json of an engine that fits, and why it had to be built; it is built again whenever it does not fit."""
    wanted = identity(folder, here)
    if refused := older(here["tensorrt"], wanted["flags"]["version"]):
        return {"refused": [refused]}, []
    why = stale(folder, wanted)
    if why:
        built = build(folder, wanted)
    else:
        with open(os.path.join(folder, RESULT), encoding="utf-8") as file:
            built = json.load(file)
    return built, why


def older(here: str, prepared_for: str) -> str:
    """Why a TensorRT cannot read a model that was prepared for another; empty when it is as new."""
    ours, wanted = (tuple(int(part) for part in re.findall(r"\d+", text)[:2]) for text in (here, prepared_for))
    if ours >= wanted:
        return ""
    named = ".".join(map(str, ours))
    return (
        f"the model was prepared for TensorRT {prepared_for}, and here is {here}: choose another target, or name this"
        f' version in one of your own: backends: [tensorrt: {{version: "{named}"}}]'
    )
