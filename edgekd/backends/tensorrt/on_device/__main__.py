"""python3 -m on_device FOLDER: make the engine in a folder, where there is none that fits.

Exit status 0: there is one. 1: the model was refused, or TensorRT is not here; the last line says why.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from .board import trtexec as find_trtexec
from .build import MODEL, build
from .cuda import CudaError
from .identity import ensured, environment, sha256
from .trtexec import TrtexecError, measured

TRTEXEC_SECONDS = 10.0


def main(folder: str) -> int:
    """Build with the Python module, without one by trtexec, which then times the engine too."""
    try:
        refused = _made(folder)
    except (CudaError, TrtexecError, OSError) as error:  # no GPU, no trtexec, no memory or disk left
        refused = [str(error)]
    for reason in refused:
        print(reason)
    return bool(refused)


def _made(folder: str) -> list[str]:
    """Why there is no engine; empty when there is one."""
    with open(os.path.join(folder, "engine.json"), encoding="utf-8") as file:
        settings = json.load(file)
    try:
        version = importlib.import_module(settings["module"]).__version__
    except ImportError as error:
        program = find_trtexec()
        if program is None:
            return [f"neither the Python module {settings['module']} nor trtexec is here: {error}"]
        measured(program, folder, seconds=TRTEXEC_SECONDS)
        return []
    if settings["compute_capability"]:  # for a chip that is not here
        wanted = {"onnx": sha256(os.path.join(folder, MODEL)), "flags": settings, "tensorrt": version}
        refused = build(folder, wanted)["refused"]  # type: list[str]
    else:
        refused = ensured(folder, environment(version))[0]["refused"]
    return refused


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
