"""Bucket quantization against its published formula, in plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd.quantize.buckets import Rounded, encode


def q(values: np.ndarray, bits: int, bucket: int) -> np.ndarray:
    """Q(v) = c + a round((v - c) / a (s - 1)) / (s - 1), bucket by bucket."""
    flat, s = values.astype(np.float64).ravel(), 2**bits
    found = []
    for at in range(0, flat.size, bucket):
        v = flat[at : at + bucket]
        c, a = v.min(), v.max() - v.min()
        a = a if a > 1e-10 else 1.0
        found.append(c + a * np.rint((v - c) / a * (s - 1)) / (s - 1))
    return np.concatenate(found).reshape(values.shape)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1,), (2,), (75,), (256,), (257,), (16, 3, 5, 5), (1000,)])
@pytest.mark.parametrize("bucket", [2, 256])
def test_the_published_formula(bits, shape, bucket):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    made = encode(torch.from_numpy(weight), bits, bucket)
    assert np.allclose(made.values().numpy(), q(weight, bits, bucket), rtol=0, atol=1e-6)
    assert made.codes.min() >= 0 and made.codes.max() <= 2**bits - 1
    assert torch.equal(made.codes, made.codes.round())


@pytest.mark.parametrize("value", [0.0, 1.0, -3.25])
def test_equal_values_are_exact(value):
    weight = torch.full((300,), value)
    assert torch.equal(encode(weight, 4, 256).values(), weight)


def test_both_ends_of_a_bucket_are_levels():
    weight = torch.rand(512, generator=torch.Generator().manual_seed(0))
    rows, found = weight.view(2, 256), encode(weight, 4, 256).values().view(2, 256)
    assert torch.equal(found.amin(1), rows.amin(1))
    assert torch.allclose(found.amax(1), rows.amax(1), rtol=1e-6)
    assert [len(row.unique()) for row in found] == [16, 16]


def test_the_fill_of_the_last_bucket_changes_nothing():
    weight = torch.randn(300, generator=torch.Generator().manual_seed(1))
    alone = encode(weight[256:], 8, 256)
    assert torch.equal(encode(weight, 8, 256).values()[256:], alone.values())
    assert encode(weight, 8, 256).codes.shape == (2, 256)
    assert encode(weight[:75], 8, 256).codes.shape == (1, 76)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_passes_straight_through(dtype):
    weight = torch.randn(10, 30, dtype=dtype, requires_grad=True)
    rounded = Rounded(4, 256)(weight)
    assert rounded.dtype == dtype and not torch.equal(rounded, weight)
    factor = torch.randn(10, 30, dtype=dtype)
    (rounded * factor).sum().backward()
    assert torch.equal(weight.grad, factor)


def test_channels_last_weights_have_the_same_buckets():
    weight = torch.randn(8, 4, 5, 5)
    last = weight.to(memory_format=torch.channels_last)
    assert torch.equal(encode(last, 8, 256).values(), encode(weight, 8, 256).values())
