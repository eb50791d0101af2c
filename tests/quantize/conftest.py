"""Small exported networks in files."""

from __future__ import annotations

import onnx
import pytest
from small_models import residual_model


@pytest.fixture
def residual(tmp_path):
    """`residual_model` in a file."""
    onnx.save(residual_model(), tmp_path / "residual.onnx")
    return tmp_path / "residual.onnx"
