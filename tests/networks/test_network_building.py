"""Networks from anywhere, and what the user reads when one cannot be had."""

from __future__ import annotations

import importlib.util
import logging
import sys

import pytest
import torch
from torch import nn

from edgekd.data import Shape
from edgekd.errors import MissingError, RecipeError
from edgekd.networks import build

SHAPE = Shape(3, 12, 12)
OWN = """
import torch
from torch import nn
import torch.nn.functional as F

class Tiny(nn.Module):
    def __init__(self, num_classes, in_channels, hidden=4):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(in_channels, hidden, 3), nn.Linear(hidden, num_classes)
    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))

class Linear(nn.Sequential):
    def __init__(self, num_classes, image_size, shape):
        super().__init__(nn.Flatten(), nn.Linear(shape.channels * image_size**2, num_classes))

class Branches(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.act, self.fc = nn.ReLU(), nn.Linear(3, num_classes)
    def forward(self, x):
        x = self.act(x).mean((2, 3))
        return self.fc(F.relu(x) if x.sum() > 0 else F.relu(-x))

def keywords(**options):
    return Tiny(**options)

def half(num_classes):
    return Tiny(num_classes, 3).half()

def features(num_classes):
    return nn.Flatten()

def pair(num_classes):
    class Pair(Tiny):
        def forward(self, x):
            return super().forward(x), x
    return Pair(num_classes, 3)

def number(num_classes):
    return num_classes

def broken(num_classes):
    raise KeyError("no such stage")

value = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder, as the user's working directory, with a module of networks."""
    (tmp_path / "mynets.py").write_text(OWN)
    (tmp_path / "unfinished.py").write_text("import no_such_package_of_mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("mynets", "unfinished"):
        sys.modules.pop(name, None)


def make(name, options=None, activation=("relu", {}), shape=SHAPE, num_classes=7):
    return build(name, options or {}, shape, num_classes, activation, seed=0)


def fails_with(error, *args, **kwargs):
    with pytest.raises(error) as caught:
        make(*args, **kwargs)
    return str(caught.value)


@pytest.mark.usefixtures("own")
def test_own_networks_get_what_their_signature_takes():
    x = torch.zeros(2, 3, 12, 12)
    assert make("mynets:Tiny", {"hidden": 5}).conv.out_channels == 5
    assert make("mynets:Linear")(x).shape == (2, 7)
    assert make("mynets:keywords", {"num_classes": 7, "in_channels": 3})(x).shape == (2, 7)
    assert next(make("mynets:half").parameters()).dtype == torch.float32
    assert torch.equal(make("mynets:Tiny").fc.weight, make("mynets:Tiny").fc.weight)


@pytest.mark.usefixtures("own")
def test_own_networks_take_other_activations():
    network = make("mynets:Tiny", activation=("lma", {"k": 4}))
    assert type(network.relu).__name__ == "LMA"


@pytest.mark.usefixtures("own")
def test_activations_that_stay_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        make("mynets:Branches")
        assert caplog.messages == []
        assert isinstance(make("mynets:Branches", activation=("prelu", {})).act, nn.PReLU)
    reason = "torch.fx cannot trace its forward: symbolically traced variables cannot be used as inputs to control flow"
    assert caplog.messages == [f"network mynets:Branches keeps its own activation relu(): {reason}"]


@pytest.mark.usefixtures("own")
def test_a_network_without_activations_refuses_another_one():
    text = fails_with(RecipeError, "mynets:Linear", activation=("lma", {}))
    assert text == (
        "error: network \"mynets:Linear\" has no activation that could become 'lma'\n"
        "       it has none at all\n"
        'fix:   use activation "relu", which leaves the network as it is'
    )


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "options", "lines"),
    [
        (
            "mynets:Tinny",
            {},
            ['network = "mynets:Tinny" is not a known callable of mynets', '(closest: "mynets:Tiny")'],
        ),
        ("mynets:value", {}, ['network = "mynets:value" is not a known callable of mynets']),
        ("mynets:Tiny", {"hiden": 4}, ["cannot be called: got an unexpected keyword argument 'hiden'", "hidden=4"]),
        ("mynets:keywords", {}, ["cannot be built: TypeError:", "missing 2 required positional arguments"]),
        ("mynets:broken", {}, ["network \"mynets:broken\" cannot be built: KeyError: 'no such stage'"]),
        ("mynets:number", {}, ['network "mynets:number" gives int', "needed: a torch.nn.Module"]),
        ("mynets:features", {}, ["gives [2, 432] for 2 images of 3x12x12", "needed: logits, a tensor [2, 7]"]),
        ("mynets:pair", {}, ["gives tuple for 2 images of 3x12x12", "make its forward return the logits alone"]),
        ("mynets:Tiny", {"in_channels": 1}, ["fails on images of 3x12x12: Given groups=1", "float32 [B,3,12,12] in"]),
        ("nonets:Tiny", {}, ["the module 'nonets' does not import: ModuleNotFoundError", "start edgekd in the folder"]),
        ("unfinished:Tiny", {}, ["'unfinished' does not import: ModuleNotFoundError: No module named 'no_such_pack"]),
    ],
)
def test_own_networks_that_cannot_be_used(name, options, lines):
    text = fails_with(RecipeError, name, options)
    for line in lines:
        assert line in text
    assert text.startswith("error: ") and "\nfix:   " in text


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "a:b:c",
        ":",
        "x:",
        ":y",
        "../nets:f",
        "a b:c",
        "a..b:c",
        "nets:f()",
        "a:b\n",
    ],
)
def test_names_that_are_no_callable_of_a_network_are_refused(name):
    text = fails_with(RecipeError, name, {"command": "touch /tmp/never"})
    assert f'network = "{name}" does not name a callable that makes a network' in text
    assert "allowed: package.module:callable of your own, timm:NAME, torchvision:NAME, or a registered name" in text


def test_unknown_names_and_options_point_at_the_closest():
    assert '(closest: "resnet")' in fails_with(RecipeError, "resnett")
    assert "depht" in fails_with(RecipeError, "resnet", {"depht": 20})
    assert "network.size = 4" in fails_with(RecipeError, "lma_student", {"size": 4})


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_an_absent_library_is_missing_with_its_pip_line(package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    text = fails_with(MissingError, f"{package}:resnet18")
    assert text == (
        f"error: this network needs the Python package '{package}', which is not installed\n"
        "       edgekd does not bring it, as its build must match that of torch\n"
        f"fix:   pip install --upgrade {package}; torchvision must be the build for torch {torch.__version__}"
    )


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_library_that_does_not_import_is_missing_with_the_reason(package, tmp_path, monkeypatch):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    text = fails_with(MissingError, f"{package}:resnet18")
    assert "which does not import: RuntimeError: operator torchvision::nms does not exist" in text
    assert (
        f"fix:   pip install --upgrade {package}; torchvision must be the build for torch {torch.__version__}" in text
    )


@pytest.mark.parametrize(("name", "channels"), [("timm:mobilenetv3_small_050", 1), ("torchvision:resnet18", 3)])
def test_library_networks_are_built_and_swapped(name, channels):
    pytest.importorskip(name.partition(":")[0], exc_type=ImportError)
    network = make(name, shape=Shape(channels, 64, 64), activation=("prelu", {}))
    assert network(torch.zeros(2, channels, 64, 64)).shape == (2, 7)
    assert any(isinstance(module, nn.PReLU) for module in network.modules())
    text = fails_with(RecipeError, name + "x")
    assert f'network = "{name}x" is not a network of' in text and f"closest: {name}" in text
