from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import error
from onnx import TensorProto, helper

from edgekd import onnx_file
from edgekd import target as targets
from edgekd.artifact import Store
from edgekd.bench.modes.single_stream import SingleStream
from edgekd.errors import RecipeError, StageError
from edgekd.recipe import Choice

ORT = Choice("onnxruntime", {})


def averaging(path, shape=("batch", 3, 4, 4), classes=True):
    """Mean over the image, as logits [B, 3] or as a map [B, 3, 1, 1]."""
    nodes = [helper.make_node("GlobalAveragePool", ["image"], ["mean"], "pool")]
    if classes:
        nodes.append(helper.make_node("Flatten", ["mean"], ["logits"], "flatten"))
    out = ["batch", 3] if classes else ["batch", 3, 1, 1]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
    made = helper.make_tensor_value_info("logits" if classes else "mean", TensorProto.FLOAT, out)
    model = helper.make_model(
        helper.make_graph(nodes, "averaging", [image], [made]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    onnx.save(model, path)
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    return averaging(tmp_path / "model.onnx")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def compiled(model, store, choice=ORT, threads=1):
    target = targets.load("local").model_copy(update={"threads": threads})
    return onnx_file.compile_file(model, target, choice, store, lambda share, text: None)


def test_a_file_is_compiled_once_for_each_backend_and_its_options(model, store):
    made = compiled(model, store)
    assert made.file("engine/engine.json").is_file() and made.result["backend"] == "onnxruntime"
    assert made.result["size_bytes"] == sum(file.stat().st_size for file in made.file("engine").iterdir())
    assert compiled(model, store).manifest == made.manifest
    others = [compiled(model, store, threads=2), compiled(model, store, Choice("null", {"latency_ms": 1.0}))]
    averaging(model, ("batch", 3, 8, 8))
    assert len({made.key, compiled(model, store).key, *(other.key for other in others)}) == 4


def test_what_cannot_be_compiled_leaves_nothing(tmp_path, store):
    with pytest.raises(RecipeError, match=r"nothing\.onnx: there is no such file"):
        compiled(tmp_path / "nothing.onnx", store)
    bad = averaging(tmp_path / "bad.onnx")
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(StageError, match=r"backend onnxruntime cannot run .*bad\.onnx: bad\.onnx is not valid ONNX"):
        compiled(bad, store)
    assert not list((store.root / "store").rglob("manifest.json"))


def test_an_engine_is_timed_against_onnxruntime(model, store):
    made = compiled(model, store, Choice("null", {"latency_ms": 2.0}))
    timed = onnx_file.time_file(
        model, made, targets.load("local"), "local:", store, SingleStream(seconds=0.3), lambda share, text: None
    )
    assert timed["latency"]["student"]["p50_ms"] > 2 > timed["latency"]["teacher"]["p50_ms"]
    assert timed["speedup"]["value"] < 1
    # Null names class 0 always; ONNX Runtime agrees with itself.
    expected = onnx_file.random_images(model).mean(axis=(2, 3)).argmax(1)
    assert timed["accuracy"]["student"]["score"] == np.mean(expected == 0)
    assert timed["accuracy"]["teacher"]["score"] == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"shape": ("batch", 3, "high", 4)}, "takes image [0, 3, 0, 4], where 0 is left open"),
        ({"shape": (8, 3, 4, 4)}, "takes image [8, 3, 4, 4], where 0 is left open"),
        ({"classes": False}, "answers one image with [1, 3, 1, 1]"),
    ],
)
def test_a_model_that_cannot_be_timed(tmp_path, store, change, why):
    model = averaging(tmp_path / "model.onnx", **change)
    made = compiled(model, store)
    with pytest.raises(RecipeError) as caught:
        onnx_file.time_file(
            model, made, targets.load("local"), "local:", store, SingleStream(), lambda share, text: None
        )
    assert caught.value.what.endswith(f"cannot be timed: it {why}")


# --- the command line ---------------------------------------------------------------------------------------------


def test_a_file_for_a_board_that_is_not_named_is_compiled_only(model, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = main("compile", "model.onnx", "--target", "raspberry-pi-5")
    size, why, path = out.splitlines()
    assert (code, why) == (0, "not timed; name the board: --device ssh://USER@HOST")
    assert size.startswith("onnxruntime, ") and (Path(path) / "engine.json").is_file()
    code, out, _ = main("compile", "model.onnx", "--target", "raspberry-pi-5", "--backend", "null", "--json")
    told = json.loads(out)
    assert (code, told["timed"], told["result"]["facts"]["runtime"]) == (0, None, "null")
    # The target's own options of a backend that is named.
    assert json.loads((Path(path) / "engine.json").read_text())["providers"] == ["CPUExecutionProvider"]


@pytest.mark.slow
def test_a_file_for_this_machine_is_timed(model, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = main("compile", "model.onnx", "--backend", "{'null': {latency_ms: 0.5}}")
    assert code in (0, 6), err  # 6: the machine is busy
    assert "Same class" in out and "times ONNX Runtime (" in out


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--backend", "tensorflow"], '--backend = "tensorflow" is not a known backend'),
        (["--backend", "{tvm"], "--backend:1: expected ',' or '}', but got '<stream end>'"),
        (["--backend", "{'null': {speed: 1}}"], "--backend.null.speed is not a known key or option of backend null"),
        (["--set", "seed=1"], "edgekd compile MODEL.onnx takes no --set: there is no recipe to it"),
        (["--dry-run"], "edgekd compile MODEL.onnx takes no --dry-run: there is no recipe to it"),
    ],
)
def test_what_a_wrong_line_gets(model, main, tmp_path, monkeypatch, arguments, what):
    monkeypatch.chdir(tmp_path)
    code, out, err = main("compile", "model.onnx", *arguments)
    assert (code, out) == (2, "") and error(err) == f"error: {what}"


def test_a_recipe_can_be_compiled_by_another_backend_too(main, tiny, own_done):
    code, _, err = main("compile", "tiny.yaml", "--store", own_done.store, "--backend", "null", "-q")
    assert code == 0, err
    runs = sorted((own_done.store / "runs").iterdir())
    record = json.loads((runs[-1] / "run.json").read_text())
    assert record["target"]["backends"] == [{"null": {"latency_ms": 0.0}}]
    assert record["command"] == "edgekd compile tiny.yaml --target local --backend null"
