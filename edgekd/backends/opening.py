"""Opens an engine in a process of its own, by the very file that does so on the device: a runtime that compiles when it
opens a model may crash there."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from edgekd.backends import Backend, child, loading

TIMEOUT_S = 900.0


def opened(backend: Backend, model: Path, folder: Path) -> dict[str, Any]:
    """What a backend's runner makes of the engine in a folder, see `loading`. model: what it was made of, for errors.

    Raises StageError when it crashes or hangs.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-") as work:
        result = Path(work, "result.json")
        return child.result_of(
            [sys.executable, "-P", loading.__file__, str(backend.runner), str(folder), str(result)],
            result,
            what=f"{backend.name}, compiling {model}",
            fix="export the model in another form, or use another backend",
            timeout=TIMEOUT_S,
            log=backend.log,
        )
