"""Volumes, and what makes maps larger: computed with the channels last, as images are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

pytest.importorskip("tvm", reason="TVM is an extra: pip install 'edgekd[tvm]'")
pytest.importorskip("tvm_ffi")

from test_tvm_backend import agrees_with_onnxruntime, create
from tvm_models import branches, convolution, joined_model, operator, per_channel, transposed

from edgekd.activations import multi_segment_layers
from edgekd.backends.tvm import runner
from edgekd.backends.tvm.convolutions import phases
from edgekd.data import Shape
from edgekd.export import export
from edgekd.networks import build
from edgekd.quantize import ptq, sessions

VOLUME_CONVOLUTIONS = {
    "plain": convolution("plain", 6, 16, (3, 3, 3), pads=[1] * 6),
    "odd": convolution("odd", 6, 5, (3, 1, 3), bias=False, strides=[1, 2, 2], pads=[1, 0, 1, 1, 0, 1]),
    "dilated": convolution("dilated", 6, 24, (2, 3, 3), dilations=[2, 1, 2]),
    "grouped": convolution("grouped", 6, 12, (3, 3, 3), group=3),
    "depthwise": convolution("depthwise", 6, 6, (3, 3, 3), group=6, pads=[1] * 6, strides=[1, 2, 2]),
    "up": transposed("up", 6, 10, (2, 2, 2), strides=[2, 2, 2]),
    "overlapping": transposed("overlapping", 6, 8, (3, 2, 4), strides=[2, 1, 2], pads=[1, 0, 1, 1, 1, 1]),
}
VOLUME_OPERATORS = [
    operator("relu", "Relu"), operator("prelu", "PRelu", "slope", arrays={"slope": per_channel.reshape(8, 1, 1, 1)}),
    operator("moved", "Add", "offsets", arrays={"offsets": per_channel.reshape(1, 8, 1, 1, 1)}),
    operator("norm", "BatchNormalization", "g", "b", "m", "v",
             arrays={"g": per_channel + 2, "b": per_channel, "m": per_channel / 2, "v": per_channel + 1.5}),
    operator("max_pool", "MaxPool", kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
    operator("average_pool", "AveragePool", kernel_shape=[3, 3, 3], pads=[1] * 6),
    operator("mean", "ReduceMean", "axes", keepdims=0, arrays={"axes": np.array([-1, 2, 3])}),
    operator("global", "GlobalAveragePool"),
    operator("resized", "Resize", "", "scales", mode="nearest", coordinate_transformation_mode="asymmetric",
             nearest_mode="floor", arrays={"scales": np.array([1, 1, 1, 2, 3], np.float32)}),
    operator("padded", "Pad", "pads", arrays={"pads": np.array([0, 1, 0, 1, 0, 0, 2, 1, 2, 0])}),
    operator("sliced", "Slice", "starts", "ends", "axis",
             arrays={"starts": np.array([1, 2]), "ends": np.array([2**31, 7]), "axis": np.array([1, 4])}),
    operator("joined", "Concat", "x", axis=1), operator("softmax", "Softmax", axis=1),
]  # fmt: skip


def test_every_operator_on_volumes_agrees_with_onnxruntime(tmp_path):
    parts = VOLUME_CONVOLUTIONS | branches(VOLUME_OPERATORS, 8, 6, 3, 3, 3)
    path = joined_model(tmp_path / "volumes.onnx", (6, 4, 6, 8), parts)
    facts = agrees_with_onnxruntime(path, tmp_path / "engine", (6, 4, 6, 8), [1, 3], threads=2)
    assert [name for name in facts["unscheduled"] if "conv" in name or "pool" in name] == []


def resized(name, scales, **attributes):
    arrays = {f"{name}.scales": np.array(scales, np.float32)}
    return operator(name, "Resize", "", f"{name}.scales", arrays=arrays, **attributes)


LARGER = {
    "doubled": transposed("doubled", 12, 16, (2, 2), strides=[2, 2]),
    "odd": transposed("odd", 12, 5, (3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    "wide": transposed("wide", 12, 8, (4, 5), strides=[2, 3], pads=[1, 2, 1, 0], bias=False),
    "cut": transposed("cut", 12, 8, (2, 2), strides=[3, 2], output_padding=[2, 0]),
    "grouped": transposed("grouped", 12, 6, (3, 3), strides=[2, 1], group=3),
    "depthwise": transposed("depthwise", 12, 12, (2, 2), strides=[2, 2], group=12),
    "dilated": transposed("dilated", 12, 4, (2, 2), strides=[2, 2], dilations=[2, 1]),
}
RESIZED = [
    resized("asymmetric", [1, 1, 2, 3], coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    resized("half_pixel", [1, 1, 3, 2], mode="nearest"),
    resized("uneven", [1, 1, 1.5, 2.5], mode="nearest", coordinate_transformation_mode="asymmetric"),
    resized("linear", [1, 1, 2, 2], mode="linear"),
    resized("shifted", [1, 1, 2, 2], coordinate_transformation_mode="asymmetric", nearest_mode="ceil"),
]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_makes_images_larger_agrees_with_onnxruntime(tmp_path, threads):
    parts = LARGER | branches(RESIZED, 8, 12, 3, 3)
    path = joined_model(tmp_path / "larger.onnx", (12, 5, 7), parts)
    facts = agrees_with_onnxruntime(path, tmp_path / "engine", (12, 5, 7), [1, 2], threads)
    assert [name for name in facts["unscheduled"] if "convolution" in name or "resize" in name] == []


def test_the_phases_of_a_transposed_convolution_in_numpy():
    """One dimension, by its definition: every input adds the kernel at its place."""
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((4, 6)), rng.standard_normal((4, 3, 5))
    expected = np.zeros((3, 5 * 2 + 5))
    for at in range(6):
        expected[:, 2 * at : 2 * at + 5] += np.einsum("i,iok->ok", x[:, at], weights)
    kernel = phases(weights, 1, [2], [3])
    assert kernel.shape == (2 * 3, 4, 3)
    window = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (2, 2))), 3, axis=1)
    found = np.einsum("iqt,cit->cq", window, kernel).reshape(2, 3, -1)  # [phase, output, q]
    np.testing.assert_allclose(found.transpose(1, 2, 0).reshape(3, -1)[:, : expected.shape[1]], expected, atol=1e-12)


class Decoder(torch.nn.Module):
    """A U-Net of one level whose map is enlarged by a transposed convolution."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        conv, up, pool = (
            (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.MaxPool2d)
            if flat
            else (torch.nn.Conv3d, torch.nn.ConvTranspose3d, torch.nn.MaxPool3d)
        )
        self.fine, self.coarse, self.pool = conv(2, 8, 3, padding=1), conv(8, 16, 3, padding=1), pool(2)
        self.up, self.head = up(16, 8, 2, stride=2), conv(16, 3, 3, padding=1)

    def forward(self, x):
        fine = torch.relu(self.fine(x))
        up = torch.relu(self.up(torch.relu(self.coarse(self.pool(fine)))))
        return self.head(torch.cat((up, fine), 1))


def unet(shape):
    options, activation = {"channels": 6, "levels": 1}, ("lma", {"k": 4, "continuous": True})
    network = build("unet", options, shape, 3, activation, 0, maps=shape.dimensions[1:])
    for _, layer in multi_segment_layers(network):
        torch.nn.init.normal_(layer.slope_deltas, 0, 0.2)
    return network


SHAPES = {"image": Shape(2, 8, 12), "volume": Shape(2, 8, 8, 4)}


@pytest.mark.parametrize(("made", "kind"), [("unet", "image"), ("decoder", "volume"), ("decoder", "image")])
def test_networks_of_maps_in_float_and_in_integers(tmp_path, kind, made):
    shape = SHAPES[kind]
    torch.manual_seed(0)
    network = unet(shape) if made == "unet" else Decoder(not shape.depth)
    images = torch.randn(24, *shape.dimensions)
    with torch.no_grad():
        network.train()(images)
    path, x = tmp_path / "float.onnx", images[:3].numpy()
    export(network.eval(), path, example=x[:1], opset=20, dynamic_batch=True, form="function", metadata={})
    int8 = ptq.prepare(path, images.numpy()).quantized("minmax", 100)
    onnx.save(int8, tmp_path / "int8.onnx")
    has_dot = {"avx512vnni", "avx512vl"} <= runner._instruction_sets()
    for precision, tolerance in (("float", 1e-5), ("int8", 0.05)):
        folder = tmp_path / precision
        folder.mkdir()
        facts = create().compile(tmp_path / f"{precision}.onnx", folder, threads=1)
        assert facts["unscheduled"] == []
        found, expected = runner.load(str(folder)).run(x), sessions.logits(onnx.load(f"{folder}.onnx"), x)
        assert found.shape == expected.shape == (3, 3, *shape.dimensions[1:])
        assert np.sqrt(np.mean((found - expected) ** 2)) <= tolerance * np.sqrt(np.mean(expected**2))
        if precision == "int8" and has_dot:
            layers = sum(node.op_type in ("Conv", "ConvTranspose") for node in int8.graph.node)
            assert facts["int8_kernels"] == layers
