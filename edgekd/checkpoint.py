"""Checkpoints of a training: written whole or not at all, and proved whole before they are believed."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from edgekd.errors import CheckpointError

_DIGEST_BYTES = hashlib.sha256().digest_size


def write_checkpoint(state: dict[str, Any], file: Path) -> None:
    """Put tensors, numbers and containers of them into `file`; a kill leaves either the old content or the new."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("wb") as handle:
        handle.write(buffer.getbuffer())
        handle.write(hashlib.sha256(buffer.getbuffer()).digest())
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(file)


def read_checkpoint(file: Path) -> dict[str, Any]:
    """What was written, tensors on the CPU. Raises CheckpointError when it is not that any more."""
    content = memoryview(file.read_bytes())
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:  # torch.load would take most flipped bits for weights
        raise CheckpointError(
            f"the checkpoint {file} is damaged",
            allowed="a kill cannot do that, as checkpoints are written whole or not at all: look at the disk",
            fix=f"rm {file}, then run again: this training starts anew",
        )
    state: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    return state
