"""Opens an engine in a process of its own, by the very file that does so on the device: a runtime that compiles when it
opens a model may crash there.

`python -m edgekd.backends.opening RUNNER FOLDER RESULT`; the result, in JSON: `facts` of the runner, or `error`, its
`kind`, and what is `known` instead of what was asked for.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgekd.backends import Backend, Engine, child, load_runner

TIMEOUT_S = 900.0


def opened(backend: Backend, model: Path, folder: Path) -> dict[str, Any]:
    """What a backend's runner makes of the engine in a folder, see above. model: what it was made of, for errors.

    Raises StageError when it crashes or hangs.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-") as work:
        result = Path(work, "result.json")
        return child.result_of(
            [sys.executable, "-m", "edgekd.backends.opening", str(backend.runner), str(folder), str(result)],
            result,
            what=f"{backend.name}, compiling {model}",
            fix="export the model in another form, or use another backend",
            timeout=TIMEOUT_S,
            log=backend.log,
        )


def main() -> None:
    """Do it."""
    runner, folder, result = sys.argv[1:]
    found: dict[str, Any]
    try:
        found = {"facts": load_runner(Engine("opened", Path(folder), Path(runner), "opened")).facts}
    except Exception as error:  # runtimes have no common error; what it is called is told
        kind = type(error).__name__
        found = {"error": str(error).strip() or kind, "kind": kind, "known": getattr(error, "known", [])}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
