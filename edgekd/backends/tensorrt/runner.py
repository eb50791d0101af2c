"""Runs a model with TensorRT, by the code in the engine's own folder. Stands alone: Python 3.8, numpy and TensorRT."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def load(folder: str) -> Any:
    """Open the engine in `folder`; it is built first where there is none that fits this board."""
    sys.path.insert(0, os.path.abspath(folder))
    return importlib.import_module("on_device.inference").Runner(folder)
