"""python3 -m on_device FOLDER [--key]: make the engine in a folder, where there is none that fits.

Exit status 0: there is one. 1: the model was refused, or TensorRT is not here; standard error ends with the reasons.
With --key nothing is made: what an engine would belong to is printed as JSON. TensorRT speaks on standard output.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from .board import trtexec as find_trtexec
from .build import build, module, settings_of
from .cuda import CudaError
from .identity import ensured, environment, identity
from .trtexec import Trtexec, TrtexecError

TRTEXEC_SECONDS = 10.0


def main(arguments: list[str]) -> int:
    """Build with the Python module, without one by trtexec, which then times the engine too."""
    folder = arguments[0]
    try:
        refused = _answered(folder) if "--key" in arguments else _made(folder)
    except OSError as error:
        refused = [f"{error.strerror or error}: {error.filename}" if error.filename else str(error)]
    except (CudaError, TrtexecError, ImportError, MemoryError) as error:
        refused = [str(error) or "Python is out of memory"]
    for reason in refused:
        sys.stderr.write(reason + "\n")
    return bool(refused)


def _answered(folder: str) -> list[str]:
    version, _ = _builder(folder)
    print(json.dumps(identity(folder, environment(version))))
    return []


def _made(folder: str) -> list[str]:
    """Why there is no engine; empty when there is one."""
    settings = settings_of(folder)
    if settings["compute_capability"]:  # for a chip that is not here
        made = build(folder, {"flags": settings})  # type: dict[str, Any]
    else:
        version, builder = _builder(folder)
        made, _ = ensured(folder, environment(version), builder)
    refused = made["refused"]  # type: list[str]
    return refused


def _builder(folder: str) -> tuple[str, Any]:
    """The version of the TensorRT that is here, and what builds with it. Raises ImportError when there is none."""
    try:
        return module(settings_of(folder)).__version__, build
    except ImportError as error:
        program = find_trtexec()
        if program is None:
            name = settings_of(folder)["module"]
            raise ImportError(f"neither the Python module {name} nor trtexec is here: {error}") from error
        trtexec = Trtexec(program)
        return trtexec.version_text, lambda folder, wanted: trtexec.build(folder, wanted, seconds=TRTEXEC_SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
