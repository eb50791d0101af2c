"""Every ONNX form of LMA against torch, through ONNX Runtime."""

import functools
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgekd.activations import FORMS, LMA, add_function, default_form, frozen
from edgekd.activations.lma import lma
from edgekd.errors import RecipeError


def trained(k, continuous, mean=0.3, std=1.5):
    torch.manual_seed(k)
    layer = lma(3, k=k, continuous=continuous)
    nn.init.normal_(layer.slope_deltas, 0, 0.5)
    nn.init.normal_(layer.biases, 0, 0.5)
    layer(torch.randn(64, 3, 8, 8) * std + mean)
    return layer.eval()


def at_and_around_the_cuts(layer):
    cuts = layer.segments().cuts.detach()
    near = torch.cat([cuts + offset for offset in (-1e-3, -1e-5, 0, 1e-5, 1e-3)])
    far = torch.tensor([-1e3, -10.0, 0.0, 10.0, 1e3])
    return torch.cat((near, far))


class Layers(nn.Module):
    """Layers of 2 and 8 segments side by side, so that one export tests both."""

    def __init__(self, form):
        super().__init__()
        self.layers = nn.ModuleList(trained(k, FORMS[form].exact_for == "continuous") for k in (2, 8))

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


@functools.cache
def exported(form):
    """The layers, the same written out in the form, samples, and the ONNX model."""
    network = Layers(form)
    edges = torch.cat([at_and_around_the_cuts(layer) for layer in network.layers])
    samples = torch.cat((edges, torch.randn(4 * 3 * 10 * 10 - len(edges)) * 3)).reshape(4, 3, 10, 10)
    written_out = frozen(network, form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(
            written_out, (samples,), dynamo=True, verbose=False, opset_version=20,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    model = program.model_proto
    add_function(model)
    onnx.checker.check_model(model)
    return network, written_out, samples, model


@pytest.mark.parametrize("form", FORMS)
def test_form_equals_torch(form):
    network, written_out, samples, model = exported(form)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in (samples, samples[:1], samples.repeat(3, 1, 1, 1)):
        by_onnxruntime = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for layer, in_torch, in_onnx in zip(network.layers, written_out(x), by_onnxruntime, strict=True):
            expected = layer(x).detach().numpy()
            # Rounding may put a value at a cut into the other segment where an index is computed and not compared.
            near = (x[..., None] - layer.segments().cuts).abs().amin(-1).detach().numpy() < 1e-6
            counted = ~near if form in ("gather", "number_sum") else np.ones_like(near)
            tolerance = np.maximum(np.abs(expected), 1) * (5e-6 if form == "number_sum" else 2e-6)
            for y in (in_torch.detach().numpy(), in_onnx):
                assert y.shape == expected.shape
                assert (np.abs(y - expected) <= tolerance)[counted].all()


@pytest.mark.parametrize("form", FORMS)
def test_form_is_made_of_standard_operators(form):
    model = exported(form)[-1]
    assert {node.domain for node in model.graph.node} == ({"edgekd"} if form == "function" else {""})
    for function in model.functions:
        assert {node.domain for node in function.node} == {""}


@pytest.mark.parametrize("continuous", [False, True])
def test_default_form_can_express_its_segments(continuous):
    form = FORMS[default_form(continuous)]
    assert continuous or form.exact_for == "any"


def test_frozen_is_a_copy_in_eval_mode():
    network = nn.Sequential(nn.Linear(3, 3), lma(3), nn.Sequential(nn.BatchNorm1d(3), lma(3)), nn.ReLU())
    x = torch.randn(8, 3)
    network(x)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    copy = frozen(network, "where")
    assert network.training
    assert not any(module.training for module in copy.modules())
    assert not any(isinstance(module, LMA) for module in copy.modules())
    torch.testing.assert_close(copy(x), network.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_unknown_form():
    with pytest.raises(RecipeError) as caught:
        frozen(lma(3), "clip-sum")
    assert str(caught.value) == (
        'error: form = "clip-sum" is not a known ONNX form of LMA\n'
        "       known: clip_sum, function, gather, max_gemm, number_sum, relu_sum, step_gemm, step_sum, where"
        '   (closest: "clip_sum")\nfix:   use "clip_sum"'
    )


def test_form_for_continuous_segments_refuses_jumps():
    with pytest.raises(RecipeError) as caught:
        frozen(nn.Sequential(lma(3)), "max_gemm")
    assert str(caught.value) == (
        'error: form "max_gemm" cannot express the jumps of LMA layer "0"\n'
        "       for any LMA: function, gather, number_sum, step_gemm, step_sum, where\n"
        'fix:   use the form "step_gemm", or train LMA with continuous = true'
    )
