from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgekd import export, networks
from edgekd.data import Shape
from edgekd.errors import RecipeError
from edgekd.methods.taps import Taps, default_taps
from edgekd.quantize import dialects, ptq, sessions

SHAPES = [Shape(3, 8, 12), Shape(1, 8, 8, 4)]


def made(shape: Shape, activation: str = "relu", seed: int = 0, **options) -> nn.Module:
    maps = shape.dimensions[1:]
    return networks.build("unet", {"channels": 6} | options, shape, 5, (activation, {}), seed, maps=maps)


def noise(shape: Shape, n: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, *shape.dimensions, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_answers_for_every_pixel_and_trains_every_parameter(shape):
    network = made(shape)
    logits = network(noise(shape))
    assert logits.shape == (3, 5, *shape.dimensions[1:])
    labels = torch.arange(logits[:, 0].numel()).view(logits[:, 0].shape) % 5
    nn.functional.cross_entropy(logits, labels).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    assert networks.count_macs(network, shape) > 0
    widths = [networks.count_params(made(shape, width=width)) for width in (0.5, 1.0, 2.0)]
    assert widths == sorted(set(widths))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_pixel_far_from_a_change_keeps_its_answer_without_halving(shape):
    """One level sees at most 12 pixels away; a network that mixed up the axes would not stay local."""
    wide = Shape(shape.channels, 40, 8, 8 if shape.depth else 0)
    network = made(wide, levels=1).eval()
    x = noise(wide, 1)
    changed = x.clone()
    changed[..., :2, :] += 3
    with torch.no_grad():
        difference = (network(x) - network(changed)).abs().amax((0, 1))
    rows = difference.reshape(-1, 40, 8).amax((0, 2))
    assert rows[:2].min() > 0 and rows[20:].max() == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "lma"])
def test_it_ends_in_onnx_and_in_int8(tmp_path, shape, activation):
    network = made(shape, activation)
    for seed in range(2):
        network.train()(noise(shape, 16, seed))
    network.eval()
    x = noise(shape, 8).numpy()
    export.export(
        network, tmp_path / "unet.onnx", example=x[:1], opset=20, form="where", dynamic_batch=True, metadata={}
    )
    session = onnxruntime.InferenceSession(tmp_path / "unet.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x})
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
    assert np.median(np.abs(logits - expected)) < 1e-4
    prepared = ptq.prepare(tmp_path / "unet.onnx", x)
    int8 = prepared.quantized("minmax", 100.0)
    onnx.checker.check_model(int8, full_check=True)
    found = sessions.logits(dialects.onnxruntime_from_int8(int8), x)
    assert ptq.sqnr_db(logits, found) > 10
    assert (found.argmax(1) == logits.argmax(1)).mean() > 0.8


def test_its_encoder_is_tapped():
    network = made(SHAPES[0])
    paths = default_taps(network, "maps", "student")
    features = Taps(network, paths, "student").probe(network, noise(SHAPES[0]))
    assert [tuple(feature.shape[2:]) for feature in features.values()] == [(8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize(
    ("shape", "levels", "allowed", "fix"),
    [
        (Shape(1, 8, 8), 4, "expected: levels from 1 to 3", "set levels to 3"),
        (Shape(1, 8, 8, 2), 2, "expected: levels from 1 to 1", "set levels to 1"),
        (Shape(1, 9, 8), 1, "expected: sides divisible by 2", "resize the images"),
    ],
)
def test_sides_that_cannot_be_halved_are_refused(shape, levels, allowed, fix):
    with pytest.raises(RecipeError) as caught:
        made(shape, levels=levels)
    assert caught.value.allowed == allowed and caught.value.fix == fix


def test_a_network_for_classes_is_refused_where_pixels_have_answers():
    with pytest.raises(RecipeError) as caught:
        networks.build("resnet", {"depth": 8}, Shape(1, 8, 8), 3, ("relu", {}), 0, maps=(8, 8))
    assert str(caught.value) == (
        'error: network "resnet" gives [2, 3] for 2 images of 1x8x8\n'
        "       needed: logits, a tensor [2, 3, 8, 8]: an answer for every pixel, as edgekd's unet gives\n"
        "fix:   use a network that keeps the size of the image"
    )
