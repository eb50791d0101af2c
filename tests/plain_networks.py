"""The registered networks that need no option: those that stand for themselves."""

from __future__ import annotations

from edgekd import registry

PLAIN_NETWORKS = [
    entry.name for entry in registry.entries("network") if not any(option.required for option in entry.options.values())
]
