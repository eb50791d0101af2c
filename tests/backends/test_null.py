from __future__ import annotations

import time

import numpy as np
import onnx
import pytest

from edgekd import registry
from edgekd.backends import Engine, load_runner
from edgekd.errors import StageError


def compiled(model, out, **options):
    backend = registry.create("backend", "null", options=options)
    return backend.compile(model, out, threads=1), load_runner(Engine("tiny", out, backend.runner, backend.name))


def test_it_says_that_it_computes_nothing(make_onnx, tmp_path):
    facts, runner = compiled(make_onnx(), tmp_path, latency_ms=1.5)
    assert facts["providers"] == ["none: the logits are zeros and the latency is a wait of 1.5 ms"]
    np.testing.assert_array_equal(runner.run(np.ones((2, 3, 6, 6), np.float32)), np.zeros((2, 5), np.float32))


def test_it_waits_as_long_as_it_is_told(make_onnx, tmp_path):
    _, runner = compiled(make_onnx(), tmp_path, latency_ms=20)
    started = time.perf_counter()
    runner.run(np.ones((1, 3, 6, 6), np.float32))
    assert time.perf_counter() - started >= 0.02


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (np.ones((1, 3, 6, 7), np.float32), r"takes float32 \[B, 3, 6, 6\], not float32 \[1, 3, 6, 7\]"),
        (np.ones((1, 3, 6, 6)), r"takes float32 \[B, 3, 6, 6\], not float64 \[1, 3, 6, 6\]"),
    ],
)
def test_it_refuses_what_the_model_would_refuse(make_onnx, tmp_path, x, error):
    _, runner = compiled(make_onnx(), tmp_path)
    with pytest.raises(ValueError, match=error):
        runner.run(x)


def test_a_model_with_an_open_image_size_is_refused(make_onnx, tmp_path):
    path = make_onnx()
    model = onnx.load(str(path))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, path)
    with pytest.raises(StageError) as caught:
        compiled(path, tmp_path)
    assert str(caught.value) == (
        f"error: {path} goes from [0, 3, 0, 6] to [0, 5]\n"
        "       from [B, C, H, W] to [B, K] with only B left open\n"
        "fix:   export with a fixed image size"
    )
