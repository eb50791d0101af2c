"""The arithmetic of LMA: its C kernel, its Triton kernel and plain torch are one function."""

import logging
import stat

import numpy as np
import pytest
import torch

from edgekd.activations import kernel
from edgekd.activations.segments import _kernel_for, apply_segments, mean_std

SHAPES = [(1,), (7,), (4096,), (5, 11), (2, 3, 17, 19), (0, 3)]


def tables(k, dtype=torch.float32, device="cpu"):
    torch.manual_seed(k)
    cuts = torch.linspace(-2, 2, k + 1, dtype=dtype, device=device)[1:-1]
    slopes, biases = torch.randn(2, k, dtype=dtype, device=device)
    return cuts, slopes.requires_grad_(), biases.requires_grad_()


def results(x, k, grad, dtype=torch.float32):
    """Statistics, output and the three gradients."""
    x = x.detach().requires_grad_()
    cuts, slopes, biases = tables(k, dtype, x.device)
    y = apply_segments(x, cuts, slopes, biases)
    y.backward(grad)
    return mean_std(x, k), y.detach(), x.grad, slopes.grad, biases.grad


@pytest.fixture
def compiled():
    if kernel.load(8) is None:
        pytest.skip("no C compiler: LMA runs as plain torch")


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(kernel, "load", lambda k: None)


@pytest.mark.parametrize("k", [2, 4, 8, 16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernel_equals_plain_torch(compiled, monkeypatch, k, shape, layout):
    x, grad = torch.randn(2, *shape)
    if len(shape) == 4:
        x = x.contiguous(memory_format=layout)
    assert _kernel_for(x, k) is not None
    fast = results(x, k, grad)
    monkeypatch.setattr(kernel, "load", lambda k: None)
    assert _kernel_for(x, k) is None
    for quick, plain in zip(fast, results(x, k, grad), strict=True):
        torch.testing.assert_close(quick, plain, rtol=1e-5, atol=2e-5, equal_nan=True)
        assert quick.stride() == plain.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernel_equals_plain_torch_in_half_precision(compiled, monkeypatch, dtype):
    x, grad = torch.randn(2, 500).to(dtype)
    fast = results(x, 8, grad)
    monkeypatch.setattr(kernel, "load", lambda k: None)
    for quick, plain in zip(fast, results(x, 8, grad), strict=True):
        assert quick.dtype == plain.dtype
        torch.testing.assert_close(quick, plain, rtol=float(torch.finfo(dtype).eps), atol=1e-5)


def test_strided_inputs_and_gradients(no_kernel, monkeypatch):
    x, grad = torch.randn(2, 40, 50)
    expected = results(x[::2, 1::3].contiguous(), 8, grad[:20, :17].contiguous())
    monkeypatch.undo()
    given = results(x[::2, 1::3], 8, grad[:20, :17])
    torch.testing.assert_close(given, expected)


def test_result_does_not_depend_on_the_number_of_threads(compiled):
    x, grad = torch.randn(2, 100_003)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(x, 8, grad)
        torch.set_num_threads(2)
        two = results(x, 8, grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(left, right) for left, right in zip(one, two, strict=True))


def test_gradients_to_the_second_order():
    x = torch.randn(30, dtype=torch.float64, requires_grad=True)
    cuts, slopes, biases = tables(4, torch.float64)
    inputs = (x, slopes, biases)
    assert torch.autograd.gradcheck(lambda *leaves: apply_segments(leaves[0], cuts, *leaves[1:]), inputs)
    assert torch.autograd.gradgradcheck(lambda *leaves: apply_segments(leaves[0], cuts, *leaves[1:]), inputs)


def test_second_derivatives_in_float32(compiled):
    x = torch.randn(30, requires_grad=True)
    cuts, slopes, biases = tables(4)
    (slope,) = torch.autograd.grad(apply_segments(x, cuts, slopes, biases).sum(), x, create_graph=True)
    slope.sum().backward()
    counts = np.bincount(np.searchsorted(cuts.numpy(), x.detach().numpy()), minlength=4)
    np.testing.assert_allclose(slopes.grad.numpy(), counts)


@pytest.mark.parametrize("plain", [False, True])
def test_a_cut_belongs_to_the_left_segment(monkeypatch, plain):
    if plain:
        monkeypatch.setattr(kernel, "load", lambda k: None)
    cuts, slopes, biases = (
        torch.tensor(values) for values in ([-1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0])
    )
    x = torch.cat((cuts, torch.nextafter(cuts, torch.tensor(torch.inf)))).repeat(3)
    assert apply_segments(x, cuts, slopes, biases).tolist() == [1, 2, 3, 2, 3, 4] * 3


@pytest.mark.parametrize("plain", [False, True])
def test_nan_stays_nan(monkeypatch, plain):
    if plain:
        monkeypatch.setattr(kernel, "load", lambda k: None)
    y = apply_segments(torch.tensor([float("nan"), 1.0] * 9), *tables(4))
    assert y.isnan().tolist() == [True, False] * 9


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_it_works_and_says_so_once(monkeypatch, tmp_path, caplog, compiler):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel.load.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "edgekd"):
            for _ in range(2):
                results(torch.randn(10), 8, torch.randn(10))
    finally:
        kernel.load.cache_clear()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "LMA trains with plain torch" in caplog.text


def test_kernel_is_compiled_once_and_kept(compiled, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel.load.cache_clear()
    try:
        assert kernel.load(6) is not None
        (library,) = (tmp_path / "edgekd" / "kernels").iterdir()
        built = library.stat()[stat.ST_MTIME]
        kernel.load.cache_clear()
        assert kernel.load(6) is not None
        assert library.stat()[stat.ST_MTIME] == built
    finally:
        kernel.load.cache_clear()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces an autograd function
def test_torch_compile_takes_the_plain_form():
    cuts, slopes, biases = tables(4)
    x = torch.randn(100, requires_grad=True)
    compiled = torch.compile(apply_segments, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, cuts, slopes, biases), apply_segments(x, cuts, slopes, biases))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gpu_equals_cpu(dtype, shape):
    x, grad = torch.randn(2, *shape).to(dtype)
    on_gpu = results(x.cuda(), 8, grad.cuda())
    for there, here in zip(on_gpu, results(x, 8, grad), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=float(torch.finfo(dtype).eps), atol=1e-4, equal_nan=True)
