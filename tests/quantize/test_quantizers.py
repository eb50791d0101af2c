"""Quantizers are made for a plan and for a dry run, where torch would be most of the time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgekd import registry

LOADING = """
import sys
from edgekd import registry
registry.entry("quantizer", sys.argv[1]).load()
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("name", registry.names("quantizer"))
def test_loading_a_quantizer_does_not_import_torch(name):
    subprocess.run([sys.executable, "-c", LOADING, name], check=True, timeout=120)
