"""Engines that compute nothing, for the real agent."""

from __future__ import annotations

from edgekd.backends import Engine, write_settings
from edgekd.backends.null import Null


def null_engine(folder, latency_ms, classes=3):
    folder.mkdir()
    settings = {"backend": "null", "threads": 1, "image": [1, 4, 4], "answer": [classes], "latency_ms": latency_ms}
    write_settings(folder, settings)
    return Engine(folder.name, folder, Null.runner, "null")
