"""ONNX files as users have them: what no runner can run is told before anything is compiled, by every backend alike."""

from __future__ import annotations

import errno
import json
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
from command_line import error
from onnx import TensorProto, helper
from tiny_model import tiny_numpy, tiny_onnx

from edgekd import registry
from edgekd.backends import Engine, load_runner, model_file
from edgekd.errors import StageError


@pytest.fixture(params=registry.names("backend"))
def backend(request):
    made = registry.create("backend", request.param)
    if reason := made.available():
        pytest.skip(f"{request.param}: {reason}")
    return made


def changed(path, change):
    """The tiny model after `change` of its graph."""
    model = onnx.load(tiny_onnx(path))
    change(model)
    onnx.save(model, path)
    return path


def second_input(model):
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 3, 6, 6]))


def of_type(name):
    def change(model):
        kind = getattr(TensorProto, name)
        model.graph.input[0].type.tensor_type.elem_type = kind
        model.graph.input[0].name = "raw"
        model.graph.node.insert(0, helper.make_node("Cast", ["raw"], ["image"], to=TensorProto.FLOAT))

    return change


def open_height(model):
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


def without_inputs(model):
    del model.graph.input[:]
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["size"], ["image"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 3, 6, 6]), "size"))


def in_a_circle(model):
    model.graph.node[0].input[0] = "active"


NEWEST = onnx.defs.onnx_opset_version()
REFUSED = {
    "two inputs": (second_input, "tiny.onnx has 2 inputs: image, mask"),
    "no input": (without_inputs, "tiny.onnx has 0 inputs: none"),
    "half precision": (of_type("FLOAT16"), "tiny.onnx takes raw as float16"),
    "bytes": (of_type("UINT8"), "tiny.onnx takes raw as uint8"),
    "a circle": (in_a_circle, "tiny.onnx is not valid ONNX: Nodes in a graph must be topologically sorted"),
    "a new opset": (
        lambda model: setattr(model.opset_import[0], "version", NEWEST + 1),
        f"tiny.onnx is written in opset {NEWEST + 1}",
    ),
    "a new format": (
        lambda model: setattr(model, "ir_version", 99),
        "tiny.onnx is not valid ONNX: Your model ir_version 99 is higher than the checker's",
    ),
    "no shape": (
        lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"),
        "tiny.onnx is not valid ONNX: Field 'shape' of 'type' is required but missing.",
    ),
}


@pytest.mark.parametrize(("change", "what"), REFUSED.values(), ids=REFUSED)
def test_what_no_runner_can_run_is_refused(backend, tmp_path, change, what):
    model = changed(tmp_path / "tiny.onnx", change)
    (problem,) = backend.check(model)
    with pytest.raises(StageError) as caught:
        backend.compile(model, tmp_path, threads=1)
    assert problem == caught.value.what and problem.startswith(what) and len(problem.splitlines()) == 1
    assert error(str(caught.value)) == f"error: {problem}"


@pytest.mark.parametrize("content", [b"", b"not a model\xff" * 40, "half"], ids=["empty", "garbage", "half"])
def test_what_is_no_model(backend, tmp_path, content):
    model = tiny_onnx(tmp_path / "tiny.onnx")
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(StageError, match=r"tiny\.onnx is not valid ONNX: ") as caught:
        backend.compile(model, tmp_path, threads=1)
    error(str(caught.value))


def test_more_than_the_batch_is_open(backend, tmp_path):
    """ONNX Runtime takes any size; the others need to know it, and say so."""
    model = changed(tmp_path / "tiny.onnx", open_height)
    if backend.name == "onnxruntime":
        assert backend.check(model) == []
        return
    (problem,) = backend.check(model)
    assert "open" in problem or "with only B left" in problem or "goes from [0, 3, 0, 6]" in problem


def external(path):
    """The tiny model with its weights in a file beside it."""
    onnx.save(onnx.load(tiny_onnx(path)), path, save_as_external_data=True, location="tiny.data", size_threshold=0)
    return path


def test_weights_in_a_file_beside_it_come_along(backend, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "engine").mkdir()
    model = external(tmp_path / "theirs" / "tiny.onnx")
    assert backend.check(model) == []
    backend.compile(model, tmp_path / "engine", threads=1)
    (tmp_path / "theirs" / "tiny.data").unlink()
    if (whole := tmp_path / "engine" / "model.onnx").is_file():
        assert model_file.external(onnx.load(whole, load_external_data=False)) == []
    if backend.runs_here and backend.name != "null":
        x = np.random.default_rng(0).standard_normal((1, 3, 6, 6)).astype(np.float32)
        run = load_runner(Engine("tiny", tmp_path / "engine", backend.runner, backend.name)).run
        np.testing.assert_allclose(run(x), tiny_numpy(x), rtol=1e-3, atol=1e-4)
    with pytest.raises(StageError) as caught:
        backend.compile(model, tmp_path / "engine", threads=1)
    assert str(caught.value).splitlines() == [
        "error: the weights of tiny.onnx are in tiny.data, which is not beside it",
        f"       looked in {tmp_path / 'theirs'}",
        "fix:   copy all files of the model, or export it into one",
    ]


def test_weights_beside_it_that_are_cut_off(tmp_path):
    model, data = external(tmp_path / "tiny.onnx"), tmp_path / "tiny.data"
    data.write_bytes(data.read_bytes()[:50])
    with pytest.raises(StageError, match=r"tiny\.onnx") as caught:
        registry.create("backend", "onnxruntime").compile(model, tmp_path, threads=1)
    error(str(caught.value))


def test_a_full_disk_is_no_fault_of_the_weights(tmp_path, monkeypatch):
    model = external(tmp_path / "tiny.onnx")
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "whole.onnx"))
    monkeypatch.setattr(onnx, "save", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left"):
        model_file.write(model, tmp_path / "whole.onnx")


def test_other_weights_beside_it_are_another_model(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    external(tmp_path / "tiny.onnx")
    engines = []
    for _ in range(2):
        code, out, err = main("compile", "tiny.onnx", "--target", "raspberry-pi-5", "--json")
        assert code == 0, err
        engines.append(json.loads(out)["engine"])
        data = bytearray((tmp_path / "tiny.data").read_bytes())
        data[0] ^= 1
        (tmp_path / "tiny.data").write_bytes(data)
    assert engines[0] != engines[1]
