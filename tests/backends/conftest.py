from __future__ import annotations

import pytest
from tiny_model import tiny_numpy, tiny_onnx


@pytest.fixture
def make_onnx(tmp_path):
    return lambda **changes: tiny_onnx(tmp_path / "tiny.onnx", **changes)


@pytest.fixture
def expected():
    return tiny_numpy
