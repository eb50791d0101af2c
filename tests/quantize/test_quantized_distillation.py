"""Quantized distillation: what trains is what is deployed, and the file is as small as its bits."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from plain_networks import PLAIN_NETWORKS
from small_models import images, run
from test_quantize_buckets import q
from test_quantize_dialects import SMALL
from torch import nn

from edgekd import activations, data, distill, networks, parity, registry
from edgekd.activations import LMA, multi_segment_layers
from edgekd.data import Shape
from edgekd.errors import RecipeError, StageError
from edgekd.export import export as write_onnx
from edgekd.quantize import sessions
from edgekd.quantize.graph import load
from edgekd.quantize.packing import float_from_packed
from edgekd.recipe import Augment, Train
from edgekd.tasks.classification import Classification

SHAPE = Shape(3, 12, 12)
EXPORT = {"example": images(1), "opset": 20, "form": "step_gemm", "dynamic_batch": True, "metadata": {"task": "test"}}


def student(name="resnet", activation=("lma", {"k": 4})):
    """A network with weights as training leaves them: statistics that fit its data, segments that are no ReLU."""
    network = networks.build(name, SMALL.get(name, {}), SHAPE, 5, activation, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, layer in multi_segment_layers(network):
            layer.slope_deltas.normal_(0, 0.1)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.weight.normal_(1, 0.2)
        for _ in range(3):
            network.train()(torch.randn(32, 3, 12, 12))
    return network.eval()


def create(**options):
    return registry.create("quantizer", "quantized_distillation", options=options, where="quantize")


def exported(tmp_path, network, settings=None, **options):
    quantizer = create(**options)
    prepared = quantizer.prepare(network, torch.from_numpy(images(8))).eval()
    facts = quantizer.export(prepared, network, tmp_path / "packed.onnx", **EXPORT | (settings or {}))
    return prepared, facts, onnx.load(tmp_path / "packed.onnx")


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    """`student` in a file, before it is quantized."""
    file = tmp_path_factory.mktemp("float") / "float.onnx"
    write_onnx(student(), file, **EXPORT)
    return file


def optimized(model, file):
    """How often each operator stands in what ONNX Runtime makes of a model."""
    sessions.opened(model, optimized=str(file))
    return Counter(node.op_type for node in onnx.load(file).graph.node)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_computes_with_the_published_formula_but_for_the_first_and_the_last_tensor(bits):
    network = student()
    prepared = create(bits=bits).prepare(network, torch.zeros(1, 3, 12, 12))
    named = dict(network.named_parameters())
    for at, (name, weight) in enumerate(named.items()):
        path, _, leaf = name.rpartition(".")
        found = getattr(prepared.get_submodule(path), leaf).detach().numpy()
        float_one = at in (0, len(named) - 1)
        expected = weight.detach().numpy() if float_one else q(weight.detach().numpy(), bits, 256)
        assert np.allclose(found, expected, rtol=0, atol=1e-6), name
        assert len(np.unique(found)) <= 2**bits * -(-found.size // 256) or float_one
    assert [leaf for leaf in named if leaf.endswith("slope_deltas")]


def test_the_gradient_at_the_rounded_weight_moves_the_float_one():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    prepared = create(bits=4).prepare(network, torch.zeros(1))
    rounded = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    state = {name: torch.from_numpy(q(value.numpy(), 4, 256)).float() for name, value in network.state_dict().items()}
    first, *_, last = network.state_dict()
    rounded.load_state_dict(state | {name: network.state_dict()[name] for name in (first, last)})
    x = torch.randn(5, 3)
    for one in (prepared, rounded):
        one(x).square().sum().backward()
    found = [value.grad for value in (prepared[1].parametrizations.weight.original, prepared[2].bias)]
    assert torch.allclose(found[0], rounded[1].weight.grad, atol=1e-5)
    assert torch.allclose(found[1], rounded[2].bias.grad, atol=1e-5)


def test_statistics_go_on_in_training_and_stand_still_in_eval():
    network = student()
    prepared = create().prepare(network, torch.zeros(1))
    layers = [module for module in prepared.modules() if isinstance(module, LMA)]
    before = [layer.running.clone() for layer in layers]
    prepared.eval()(torch.randn(8, 3, 12, 12))
    assert all(torch.equal(old, layer.running) for old, layer in zip(before, layers, strict=True))
    prepared.train()(torch.randn(8, 3, 12, 12) * 3)
    assert not any(torch.equal(old, layer.running) for old, layer in zip(before, layers, strict=True))
    assert torch.equal(next(multi_segment_layers(network))[1].running, before[0])


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_the_file_is_small_and_computes_what_torch_computes(tmp_path, float_model, bits):
    check_the_file(tmp_path, student(), bits, float_model)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PLAIN_NETWORKS if name != "resnet"])
def test_the_zoo(tmp_path, name):
    write_onnx(student(name), tmp_path / "float.onnx", **EXPORT)
    check_the_file(tmp_path, student(name), 4, tmp_path / "float.onnx")


def check_the_file(tmp_path, network, bits, float_model):
    prepared, facts, packed = exported(tmp_path, network, bits=bits)
    x = images(32, 1)
    with torch.no_grad():
        expected, plain = (one(torch.from_numpy(x)).numpy() for one in (prepared, network))
    assert np.array_equal(expected, plain)  # the float network got the deployed weights
    unpacked = float_from_packed(packed)
    onnx.checker.check_model(unpacked, full_check=True)
    for model in (packed, unpacked):
        found = sessions.logits(model, x)
        parity.parity(network, lambda index: x[index], expected, found, 1e-4, Classification()).check("the model")
    # The weights are the same bits; ONNX Runtime may add them up in another order.
    np.testing.assert_allclose(run(packed, x), run(unpacked, x), rtol=1e-5, atol=1e-4)

    # Unpacking is gone before anything runs, batch normalisation too, and it is no node of the float model.
    nodes = optimized(packed, tmp_path / "optimized.onnx")
    assert nodes == optimized(onnx.load(float_model), tmp_path / "optimized.onnx")
    assert not {"Floor", "Concat", "ReduceProd", "BatchNormalization"} & set(nodes)

    weights = {key: value.numel() for key, value in network.named_parameters() if value.dim() > 1}
    first = next(iter(weights))
    assert facts["unpacked"] == [first] and set(facts["packed"]) == weights.keys() - {first}
    in_all = sum(weights[key] for key in facts["packed"])
    assert facts["bits_per_weight"] == pytest.approx(8 * stored_bytes(packed, facts["packed"]) / in_all)
    assert facts["size_bytes"] == (tmp_path / "packed.onnx").stat().st_size < float_model.stat().st_size
    assert packed.metadata_props[0].value == "test"

    rows = facts["account"]["layers"]
    assert sorted(row["layer"] for row in rows) == sorted(name.removesuffix(".weight") for name in weights)
    # The first weight is in float, but for the normalisation with few bits that may be folded into it.
    rounded = [row for row in rows if f"{row['layer']}.weight" != first]
    assert all(row["quantized"] and 10 < row["weights_sqnr_db"] < 100 for row in rounded)


def stored_bytes(model, names):
    sizes = {tensor.name: onnx.numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer}
    return sum(sizes[f"{name}_{part}"] for name in names for part in ("packed", "step", "minimum"))


@pytest.mark.parametrize("bits", [4, 8])
def test_full_buckets_take_a_quarter_of_a_bit_more_than_their_codes(tmp_path, bits):
    network = nn.Sequential(nn.Flatten(), nn.Linear(432, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 5))
    _, _, packed = exported(tmp_path, network, bits=bits)
    assert 8 * stored_bytes(packed, ["2.weight"]) == (bits + 0.25) * 64 * 64


def test_it_trains_stops_and_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "CHECKPOINT_SECONDS", 0.0)
    digits = data.load("digits", {}, train_limit=200, test_limit=60)

    class KilledError(Exception):
        pass

    def kill(at):
        if at.done == 10:
            raise KilledError

    def trained(work, on_progress=lambda at: None):
        network = networks.build("resnet", SMALL["resnet"], Shape(1, 8, 8), 10, ("lma", {"k": 4}), 0)
        prepared = create(bits=4).prepare(network, torch.zeros(1))
        work.mkdir(exist_ok=True)
        spec, scratch = Train(epochs=2, batch_size=32, lr=0.05, ema=0.9), registry.create("method", "scratch")
        distill.train(prepared, digits, spec, scratch, augment=Augment(), seed=0, work=work, on_progress=on_progress)
        return network, prepared

    network, whole = trained(tmp_path / "whole")
    with pytest.raises(KilledError):
        trained(tmp_path / "killed", kill)
    _, resumed = trained(tmp_path / "killed")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.equal(whole.stem[0].weight, network.stem[0].weight)
    x = torch.ones(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(whole(x), resumed(x))


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"bits": 3}, [
            "error: quantize.bits = 3 is not valid",
            "       expected: 4 | 8   (should be 4 or 8)",
            "fix:   correct quantize.bits, or see: edgekd list quantizers"]),
        ({"bucket": 7}, [
            "error: quantize.bucket = 7 cannot be packed",
            "       allowed: even, from 2; the papers use 256",
            "fix:   set quantize.bucket = 256"]),
    ],
)  # fmt: skip
def test_options_that_are_refused(options, lines):
    with pytest.raises(RecipeError) as caught:
        create(**options)
    assert str(caught.value).splitlines() == lines


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ([float("nan"), 1.0], "1 of 16 are NaN or infinite"),
        ([float("inf"), float("-inf")], "2 of 16 are NaN or infinite"),
        ([3e38, -3e38], "their range, -3e+38 to 3e+38, is infinite in float32"),
    ],
)
def test_weights_without_a_finite_range_are_refused(values, what):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        network[1].weight[0, :2] = torch.tensor(values)
    with pytest.raises(StageError) as caught:
        create().prepare(network, torch.zeros(1))
    assert str(caught.value).splitlines() == [
        f"error: the weights 1.weight cannot be quantized: {what}",
        "       expected: every weight of the float student is finite",
        "fix:   train the student again, with a lower train.lr or with train.clip = 1",
    ]


def test_a_network_of_two_tensors_has_nothing_to_quantize():
    with pytest.raises(StageError) as caught:
        create().prepare(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1))
    assert str(caught.value).splitlines() == [
        "error: the network has no weights to quantize: the first and the last of its parameters stay in float",
        "       needed: at least 3 parameter tensors",
        "fix:   use a deeper network, or another quantize.method",
    ]


def test_weights_of_one_value_are_told(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(432, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    nn.init.zeros_(network[2].weight)
    _, facts, packed = exported(tmp_path, network)
    assert facts["warnings"] == ["the weights 2.weight are all 0: their layer tells no input from another"]
    assert np.isfinite(run(packed, images(2))).all()


def test_a_layer_whose_buckets_are_stretched_gets_a_suggestion(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(432, 4), nn.Linear(4, 64, bias=False), nn.Linear(64, 5))
    with torch.no_grad():
        network[2].weight[0, 0] = 30.0
    suggestions = [row["suggestion"] for row in exported(tmp_path, network, bits=4)[1]["account"]["layers"]]
    assert suggestions[0] == suggestions[2] == ""
    assert re.fullmatch(
        r"4 bits keep -?\d+ dB of the weights of 2: a few large ones stretch their buckets; "
        r"set a smaller quantize\.bucket, or quantize\.bits = 8\.",
        suggestions[1],
    )


@pytest.mark.slow
def test_forms_and_opsets(tmp_path):
    for form in activations.FORMS:
        if activations.FORMS[form].exact_for == "any":
            _, _, model = exported(tmp_path, student(), settings={"form": form, "opset": 18})
            assert len(sessions.logits(model, images(2))) == 2
            assert len(load_float(model, tmp_path).lma) == 7


def load_float(model, tmp_path):
    onnx.save(float_from_packed(model), tmp_path / "float.onnx")
    return load(tmp_path / "float.onnx")
