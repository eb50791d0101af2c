"""The registered networks that need no option and name classes: those that stand for themselves."""

from __future__ import annotations

from edgekd import registry

# An answer for every pixel: tested in networks/test_unet.py, in two and three dimensions.
WITH_MAPS = ("unet",)
PLAIN_NETWORKS = [
    entry.name
    for entry in registry.entries("network")
    if entry.name not in WITH_MAPS and not any(option.required for option in entry.options.values())
]
