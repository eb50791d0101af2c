"""What an engine belongs to: this model, these flags, this TensorRT, this very kind of board."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from .board import board
from .build import MODEL, PLAN, RESULT, build
from .cuda import Cuda

# What makes two boards different for an engine. Even with the same chip, another number of multiprocessors means other
# kernels, and another L4T another driver.
ENVIRONMENT = ("tensorrt", "compute_capability", "multiprocessors", "device", "l4t")


def environment(version: str, root: str = "/") -> dict[str, Any]:
    """Where we are. version: of TensorRT, as its module says. Raises CudaError where there is no GPU."""
    return dict(Cuda().facts(), tensorrt=version, l4t=board(root)["l4t"])


def identity(folder: str, here: dict[str, Any]) -> dict[str, Any]:
    """The engine key of the model in a folder, for the board `here`: an engine fits where its key is equal."""
    with open(os.path.join(folder, "engine.json"), encoding="utf-8") as file:
        settings = json.load(file)
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
    if digest != built.get("plan_sha256"):
        return ["its file is damaged, or was not built here"]
    return differences(built.get("identity", {}), wanted)


def ensured(folder: str, here: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """build.json of an engine that fits, and why it had to be built; it is built again whenever it does not fit."""
    wanted = identity(folder, here)
    why = stale(folder, wanted)
    if why:
        built = build(folder, wanted)
    else:
        with open(os.path.join(folder, RESULT), encoding="utf-8") as file:
            built = json.load(file)
    return built, why


def sha256(path: str) -> str:
    """Digest of a file, read in pieces: a board has little memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()
