"""Loads a runner from its file. Stands alone: a process that does nothing else starts in the time of its runtime.

`python -P loading.py RUNNER FOLDER RESULT`; the result, in JSON: `facts` of the runner, or `error`, its `kind`, and
what is `known` instead of what was asked for.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any


def load(file: str, folder: str) -> Any:
    """The runner in a file, for the engine in a folder."""
    spec = importlib.util.spec_from_file_location("edgekd_runner", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(folder)


def main() -> None:
    """Do it."""
    runner, folder, result = sys.argv[1:]
    found: dict[str, Any]
    try:
        found = {"facts": load(runner, folder).facts}
    except Exception as error:  # runtimes have no common error; what it is called is told
        kind = type(error).__name__
        found = {"error": str(error).strip() or kind, "kind": kind, "known": getattr(error, "known", [])}
    with open(result, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
