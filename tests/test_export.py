"""The exported graph computes what torch computes, says what it is, and nothing of the exporter reaches the user."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from edgekd import activations, data, networks
from edgekd.errors import ExportError, RecipeError
from edgekd.export import export, operators

SHAPE = data.Shape(1, 8, 8)
METADATA = {"class_names": ["zero", "one"], "mean": [0.25], "task": "image-classification"}


def small(activation: str = "lma", **options) -> nn.Module:
    """Every kind of layer once, with the statistics and curves that training leaves behind."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5),
    )  # fmt: skip
    torch.manual_seed(0)
    if activation != "relu":
        networks.swap_activations(network, activation, options, torch.randn(2, 1, 8, 8))
    for name, parameter in network.named_parameters():
        if "slope" in name or "bias" in name:
            nn.init.normal_(parameter, 0, 0.3)
    for _ in range(3):
        network(torch.randn(32, 1, 8, 8) * 1.5 + 0.2)
    return network


def exported(network: nn.Module, path: Path, *, form: str = "where", opset: int = 20, dynamic: bool = True) -> dict:
    example = np.zeros((1, 1, 8, 8), np.float32)
    return export(
        network, path, example=example, opset=opset, dynamic_batch=dynamic, form=form, metadata=METADATA
    )  # fmt: skip


def assert_same_logits(network: nn.Module, path: Path, batches=(1, 2, 7)) -> None:
    session = onnxruntime.InferenceSession(str(path))
    network.eval()
    for size in batches:
        x = torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(size)) * 1.5
        with torch.no_grad():
            expected = network(x).numpy()
        (got,) = session.run(["logits"], {"images": x.numpy()})
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", activations.FORMS)
@pytest.mark.parametrize("continuous", [True, False], ids=["continuous", "jumps"])
def test_every_form_computes_what_torch_computes(form, continuous, tmp_path):
    network = small(k=4, continuous=continuous)
    if activations.FORMS[form].exact_for == "continuous" and not continuous:
        with pytest.raises(RecipeError, match=f'form "{form}" cannot express the jumps'):
            exported(network, tmp_path / "model.onnx", form=form)
        assert not list(tmp_path.iterdir())
        return
    exported(network, tmp_path / "model.onnx", form=form)
    assert_same_logits(network, tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 19, 21, 23])
def test_every_opset(opset, tmp_path):
    network = small()
    found = exported(network, tmp_path / "model.onnx", opset=opset)
    assert found["opset"] == opset
    assert_same_logits(network, tmp_path / "model.onnx")


def test_a_static_batch_takes_one_image(tmp_path):
    network = small("relu")
    exported(network, tmp_path / "model.onnx", dynamic=False)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [1, 1, 8, 8]
    assert_same_logits(network, tmp_path / "model.onnx", batches=(1,))


def test_what_is_in_the_file(tmp_path):
    network = small("relu")
    found = exported(network, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert {prop.key: prop.value for prop in model.metadata_props} == {
        "class_names": '["zero", "one"]', "mean": "[0.25]", "task": "image-classification",
    }  # fmt: skip
    assert json.loads(model.metadata_props[0].value) == ["zero", "one"]
    assert model.producer_name == "edgekd"
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    batch, *rest = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param and [d.dim_value for d in rest] == [1, 8, 8]
    assert found["operators"] == operators(model)
    assert "BatchNormalization" not in found["operators"]  # both are folded
    assert found["operators"]["Conv"] == 1
    assert found["size_bytes"] == (tmp_path / "model.onnx").stat().st_size
    assert (found["opset"], found["form"]) == (20, "where")
    assert str(Path(torch.__file__).parent) not in (tmp_path / "model.onnx").read_bytes().decode("latin1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "lma_student"])
def test_batch_normalisation_is_folded_in_real_networks(name, tmp_path):
    options = {"resnet": {"depth": 8, "width": 0.25}, "mobilenet_v2": {"width": 0.25}, "lma_student": {"width": 0.2}}
    network = networks.build(name, options[name], SHAPE, 5, ("relu", {}), 0)
    network(torch.randn(64, 1, 8, 8))
    found = exported(network, tmp_path / "model.onnx", dynamic=False)
    assert "BatchNormalization" not in found["operators"]
    assert_same_logits(network, tmp_path / "model.onnx", batches=(1,))


def test_nothing_else_is_touched(tmp_path, capfd, caplog):
    network = small()
    network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    logger = logging.getLogger("torch.onnx")
    state = (
        torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_default_dtype(), logger.level,
        logging.root.manager.disable, list(warnings.filters), logging.root.level,
    )  # fmt: skip
    capfd.readouterr()
    exported(network, tmp_path / "model.onnx")
    assert (
        torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_default_dtype(), logger.level,
        logging.root.manager.disable, list(warnings.filters), logging.root.level,
    ) == state  # fmt: skip
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.flatten(1))
        return logits * 2 if logits.sum() > 0 else logits


class WithoutOperator(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x[:, 0]).real @ self.fc.weight[:, :8].T


class OfTwo(Branching):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.reshape(2, 64))
        return logits


@pytest.mark.parametrize(
    ("network", "what"),
    [
        (Branching(), "torch cannot export the network: Could not guard on data-dependent expression"),
        (WithoutOperator(), "torch cannot export the network: No ONNX function found for"),
    ],
)
def test_a_network_that_cannot_be_exported(network, what, tmp_path, capfd):
    with pytest.raises(ExportError) as caught:
        exported(network, tmp_path / "model.onnx")
    first, allowed, fix = str(caught.value).splitlines()
    assert first.startswith(f"error: {what}")
    assert allowed == "       needed: a forward that torch.export can trace, of operators that ONNX has"
    assert fix == "fix:   change the network's forward; the exporter's whole report: run with --debug"
    assert caught.value.__cause__ is not None
    assert caught.value.exit_code == 4
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_network_for_one_batch_size(tmp_path):
    with pytest.raises(ExportError) as caught:
        exported(OfTwo(), tmp_path / "model.onnx")
    assert str(caught.value) == (
        "error: the network can be exported for one batch size only\n"
        "       its forward fixes the batch size, for example by reshape(2, -1)\n"
        "fix:   set export.batch = static, or write x.flatten(1) and x.shape[0] in its forward"
    )
    assert not list(tmp_path.iterdir())
