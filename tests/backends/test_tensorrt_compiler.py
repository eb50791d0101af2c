"""Held against the real compiler of TensorRT-RTX, where the extra trt-check is installed; it needs no GPU."""

from __future__ import annotations

import functools
import json
import sys

import numpy as np
import onnx
import pytest
import torch

from edgekd import activations, export, networks, registry, target
from edgekd.activations import multi_segment_layers
from edgekd.backends.tensorrt import TensorRT, built, compiler
from edgekd.data import Shape
from edgekd.errors import MissingError, StageError
from edgekd.quantize import half, ptq

needs_compiler = pytest.mark.skipif(bool(compiler.missing()), reason=f"extra trt-check: {compiler.missing()}")
IMAGE = (3, 32, 32)
ACTIVATIONS = {"relu": ("relu", {}), "any": ("lma", {"k": 8}), "continuous": ("lma", {"k": 8, "continuous": True})}
ZOO = {
    "student-3": ("lma_student", {"size": 3}),
    "teacher": ("lma_teacher", {"width": 0.25}),
    "resnet-8": ("resnet", {"depth": 8}),
    "resnet-20": ("resnet", {"depth": 20}),
    "wrn-16-1": ("wrn", {"depth": 16, "k": 1}),
    "mobilenet-v2": ("mobilenet_v2", {"width": 0.25}),
}
BOARDS = [name for name in target.names() if name.startswith("jetson-")]
# A row of the table that the builder prints, in its format.
ROW = (
    "Name: {name}, LayerType: {type}, Inputs: [ {{ Name: a, Dimensions: [1,4], Datatype: {input}, Format: f }}], "
    "Constants: [ {{ Name: w, Dimensions: [4], Datatype: {constant}, Format: f }}], "
    "Outputs: [ {{ Name: b, Dimensions: [1,4], Datatype: Float, Format: f }}], TacticName: t, StreamId: 0, "
    "Metadata: [ONNX Layer: conv]\x1f[ONNX Layer: w_QuantizeLinear]"
)


def int8_model(folder, name, activation, form=None):
    """A network with segments as training leaves them, quantized: the file."""
    network_name, options = ZOO[name]
    network = networks.build(network_name, options, Shape(*IMAGE), 10, ACTIVATIONS[activation], 0).eval()
    torch.manual_seed(0)
    for _, layer in multi_segment_layers(network):
        torch.nn.init.normal_(layer.slope_deltas, 0, 0.2)
        torch.nn.init.normal_(layer.biases, 0, 0.05)
    image = np.zeros((1, *IMAGE), np.float32)
    form = form or TensorRT.forms.get(activation, "gather")
    export.export(network, folder / "float.onnx", example=image, opset=20, dynamic_batch=False, form=form, metadata={})
    images = np.random.default_rng(0).standard_normal((8, *IMAGE)).astype(np.float32)
    ptq.quantize(folder / "float.onnx", folder / "int8.onnx", images)
    return folder / "int8.onnx"


def accounted(file, **options):
    compiled = compiler.compiled(file, file.with_suffix(".log"), **options)
    assert compiled.refused == ()
    return compiler.account(onnx.load(file), compiled.kernels)


@pytest.fixture(scope="module")
def relu_kernels(tmp_path_factory):
    """How many kernels a network of the zoo has with ReLU; compiled once."""

    @functools.cache
    def count(name):
        return accounted(int8_model(tmp_path_factory.mktemp("relu"), name, "relu")).kernels

    return count


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ZOO)
def test_every_layer_of_the_zoo_is_an_int8_kernel_and_lma_costs_none(tmp_path, relu_kernels, name, activation):
    file = int8_model(tmp_path, name, activation)
    for board in BOARDS:
        assert registry.create("backend", "tensorrt", options=target.load(board).choices[0].options).check(file) == []
    found = accounted(file)
    assert found.in_float == ()
    assert found.int8_convolutions == found.convolutions > 0
    assert found.int8_products == found.products > 0
    assert found.kernels <= relu_kernels(name)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("form", activations.FORMS)
def test_every_form_is_accepted_with_its_layers_in_int8(tmp_path, form):
    activation = activations.FORMS[form].exact_for
    assert accounted(int8_model(tmp_path, "student-3", activation, form)).in_float == ()


@needs_compiler
def test_a_float_model_has_no_int8_kernel(make_onnx):
    found = accounted(make_onnx(), precision="fp32")
    assert (found.int8_convolutions, found.convolutions, found.int8_products, found.products) == (0, 1, 0, 1)
    assert found.in_float == ("kernel", "matrix")
    assert found.kernels >= 2


@needs_compiler
def test_a_model_that_is_refused_says_which_node(make_onnx, tmp_path):
    compiled = compiler.compiled(make_onnx(operator="Magic", domain="my.ops"), tmp_path / "compiler.log")
    (reason,) = compiled.refused
    assert reason.startswith("activation (Magic): ") and "Plugin not found" in reason
    assert compiled.kernels == () and compiled.evidence == "linted"


@needs_compiler
def test_what_was_compiled_for_which_chip_is_said(make_onnx, tmp_path):
    compiled = compiler.compiled(make_onnx(), tmp_path / "compiler.log", sm=89)
    assert compiled.evidence == f"compiled_by_tensorrt_rtx({compiled.compiler.split()[1]}, sm_89)"
    assert "Layers:" in (tmp_path / "compiler.log").read_text(errors="replace")


@needs_compiler
def test_a_model_is_examined_by_linter_and_compiler(make_onnx, tmp_path):
    found = TensorRT(version="8.2.1").examine(make_onnx(), tmp_path / "compiler.log")
    assert json.loads(json.dumps(found))["version"] == "8.2.1"
    assert found["findings"] == [] and found["evidence"].startswith("compiled_by_tensorrt_rtx(")
    assert (found["compiled"]["convolutions"], found["compiled"]["int8_convolutions"]) == (1, 0)
    assert len(found["compiled"]["layers"]) == found["compiled"]["kernels"]


def test_without_the_compiler_a_model_is_linted(make_onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "missing", lambda: "tensorrt_rtx is not installed")
    found = TensorRT(version="8.6.2").examine(make_onnx(operator="Hardmax", opset=17), tmp_path / "compiler.log")
    assert (found["evidence"], found["compiled"]) == ("linted", None)
    assert [finding["rule"] for finding in found["findings"]] == ["operator"]


@needs_compiler
def test_a_compiler_that_hangs_is_ended(make_onnx, tmp_path):
    log, model = tmp_path / "compiler.log", make_onnx()
    with pytest.raises(StageError) as caught:
        compiler.compiled(model, log, timeout=0.01)
    assert str(caught.value) == (
        f"error: tensorrt_rtx, compiling {model}: it did not end within 0.01 s\n"
        f"       it said nothing\n       all of them: {log}\n"
        "fix:   export the model in another form or precision, or compile it on the device"
    )


def test_a_compiler_that_crashes_does_not_take_us_down(make_onnx, tmp_path, monkeypatch):
    (tmp_path / "crashing_compiler.py").write_text("import os\nprint('an assertion of mine', flush=True)\nos.abort()\n")
    monkeypatch.setattr(compiler, "MODULE", "crashing_compiler")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    log, model = tmp_path / "compiler.log", make_onnx()
    with pytest.raises(StageError) as caught:
        compiler.compiled(model, log)
    assert str(caught.value) == (
        f"error: crashing_compiler, compiling {model}: it crashed (SIGABRT)\n"
        f"       its last lines:\n         an assertion of mine\n       all of them: {log}\n"
        "fix:   export the model in another form or precision, or compile it on the device"
    )


def test_without_the_compiler_the_extra_is_named(make_onnx, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingError) as caught:
        compiler.compiled(make_onnx(), tmp_path / "compiler.log")
    assert str(caught.value) == (
        "error: tiny.onnx cannot be compiled here: tensorrt_rtx is not installed\n"
        "       wheels: Linux on x86_64; no GPU is needed\n"
        "fix:   pip install 'edgekd[trt-check]'"
    )


@pytest.mark.parametrize(
    ("row", "integer"),
    [
        ({"type": "correlation", "input": "Int8", "constant": "Int8"}, True),
        ({"type": "gemm", "input": "Int8", "constant": "Int8"}, True),
        ({"type": "correlation", "input": "Float", "constant": "Float"}, False),
        ({"type": "correlation", "input": "Float", "constant": "Int8"}, False),
        ({"type": "correlation", "input": "Int8", "constant": "Float"}, False),
        ({"type": "kgen", "input": "Int8", "constant": "Int8"}, False),  # pads the channels of the convolution after it
        ({"type": "runtime_fusion", "name": "__myl_CorrAddRelu_myl0_3", "input": "Int8", "constant": "Int8"}, True),
        # Makes floats of the codes and multiplies those.
        ({"type": "runtime_fusion", "name": "__myl_CastMulFc_myl0_1", "input": "Int8", "constant": "Int8"}, False),
    ],
)
def test_what_counts_as_int8(row, integer):
    (kernel,) = compiler.kernels_from_log(f"VERBOSE|Layers:\n{ROW.format(**{'name': 'conv_myl0_1', **row})}\n")
    assert kernel.multiplies_integers is integer
    assert kernel.nodes == ("conv", "w_QuantizeLinear")
    assert (kernel.inputs, kernel.constants, kernel.outputs) == ((row["input"],), (row["constant"],), ("Float",))
    assert kernel.tactic == "t"


def test_a_layer_runs_in_the_precision_of_what_multiplies_for_it(tmp_path, make_onnx):
    """What casts the images for a convolution has its name too, and comes first."""
    half.quantize(make_onnx(), tmp_path / "half.onnx", np.ones((2, 3, 6, 6), np.float32))
    rows = [("__myl_Cast_myl0_0", "kgen", "Float"), ("conv_myl0_1", "correlation", "Half")]
    text = [ROW.format(name=name, type=kind, input=reads, constant="Half") for name, kind, reads in rows]
    layer, _ = built.layer_rows(onnx.load(tmp_path / "half.onnx"), compiler.kernels_from_log("\n".join(text)))
    assert layer == {"layer": "kernel", "operator": "Conv", "asked": "fp16", "ran": "fp16", "kernel": "conv_myl0_1"}


@needs_compiler
@pytest.mark.parametrize("activation", ["relu", "continuous"])
def test_half_precision_is_what_the_graph_says(tmp_path, activation):
    network_name, options = ZOO["student-3"]
    network = networks.build(network_name, options, Shape(*IMAGE), 10, ACTIVATIONS[activation], 0).eval()
    image = np.random.default_rng(0).standard_normal((1, *IMAGE)).astype(np.float32)
    file, form = tmp_path / "float.onnx", TensorRT.forms["continuous"]
    export.export(network, file, example=image, opset=20, dynamic_batch=False, form=form, metadata={})
    half.quantize(file, tmp_path / "half.onnx", image)
    compiled = compiler.compiled(tmp_path / "half.onnx", tmp_path / "log", precision="fp16")
    rows = built.layer_rows(onnx.load(tmp_path / "half.onnx"), compiled.kernels)
    assert [(row["asked"], row["ran"]) for row in rows] == [("fp16", "fp16")] * len(rows) and len(rows) == 6


def test_what_runs_on_the_host_is_no_kernel():
    assert compiler.kernels_from_log(ROW.format(name="n", type="shape_call", input="Float", constant="Float")) == ()
