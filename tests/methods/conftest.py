"""Every test of a method has one thread."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def always_one_thread(one_thread):
    pass
