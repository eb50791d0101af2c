from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_stand_in
from command_line import error, without
from onnx import TensorProto, helper
from tiny_model import tiny_onnx

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
    assert (made.result["evidence"], made.result["findings"]) == ("compiled_on_host", [])
    assert compiled(model, store).manifest == made.manifest
    others = [compiled(model, store, threads=2), compiled(model, store, Choice("null", {"latency_ms": 1.0}))]
    averaging(model, ("batch", 3, 8, 8))
    assert len({made.key, compiled(model, store).key, *(other.key for other in others)}) == 4


def test_what_cannot_be_compiled_leaves_nothing(tmp_path, store):
    with pytest.raises(RecipeError, match=r"nothing\.onnx: there is no such file"):
        compiled(tmp_path / "nothing.onnx", store)
    bad = averaging(tmp_path / "bad.onnx")
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(StageError, match=r"error: bad\.onnx is not valid ONNX: it is cut off"):
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


def test_a_model_whose_sizes_do_not_fit_is_no_fault_of_ours(tmp_path, store):
    model = onnx.load(tiny_onnx(tmp_path / "tiny.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4  # the checker lets it pass
    onnx.save(model, tmp_path / "tiny.onnx")
    made, local = compiled(tmp_path / "tiny.onnx", store), targets.load("local")
    with pytest.raises(StageError, match=r"ONNX Runtime cannot run .*tiny\.onnx: .* Input channels C is not equal"):
        onnx_file.time_file(
            tmp_path / "tiny.onnx", made, local, "local:", store, SingleStream(), lambda share, text: None
        )


# --- the command line ---------------------------------------------------------------------------------------------


def test_a_file_for_a_board_that_is_not_named_is_compiled_only(model, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = main("compile", "model.onnx", "--target", "raspberry-pi-5")
    size, why, path = out.splitlines()
    assert (code, why) == (0, "not timed; name the board: --device ssh://USER@HOST")
    assert size.startswith("onnxruntime ") and "compiled_on_host" in size and (Path(path) / "engine.json").is_file()
    code, out, _ = main("compile", "model.onnx", "--target", "raspberry-pi-5", "--backend", "null", "--json")
    told = json.loads(out)
    assert (code, told["timed"], told["result"]["facts"]["runtime"]) == (0, None, "null")
    # The target's own options of a backend that is named.
    assert json.loads((Path(path) / "engine.json").read_text())["providers"] == ["CPUExecutionProvider"]


def test_a_file_that_cannot_be_timed_is_compiled_unless_a_device_was_asked_for(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    averaging(tmp_path / "map.ONNX", classes=False)
    why = "map.ONNX cannot be timed: it answers one image with [1, 3, 1, 1]"
    code, out, err = main("compile", "map.ONNX")
    size, untimed, path = out.splitlines()
    assert (code, untimed) == (0, f"not timed; {why}"), err
    assert size.endswith("; compiled_on_host") and (Path(path) / "model.onnx").is_file()
    code, out, err = main("compile", "map.ONNX", "--device", "local:", "-q")
    assert (code, out, error(err)) == (2, "", f"error: {why}")


@pytest.mark.slow
def test_a_file_for_this_machine_is_timed(model, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = main("compile", "model.onnx", "--backend", "{'null': {latency_ms: 0.5}}")
    assert code in (0, 6), err  # 6: the machine is busy
    assert "Same class" in out and "times ONNX Runtime (" in out


# --- a Jetson, which builds its engines itself --------------------------------------------------------------------

needs_stand_in = pytest.mark.skipif(bool(tensorrt_stand_in.missing()), reason=tensorrt_stand_in.missing())


@pytest.fixture
def jetson(main, tmp_path, monkeypatch):
    """jetson(board, model, arguments): what the command line says of a file for a Jetson; the board stands for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SingleStream.__init__.__kwdefaults__, "seconds", 0.3)

    def run(board, model, *arguments):
        url = f"local:?python={board.python}"
        return main("compile", model, "--target", "jetson", "--device", url, *arguments)

    return run


@needs_stand_in
@pytest.mark.slow
def test_a_file_is_built_on_a_jetson_and_timed_there_by_the_same_engine(jetson, tmp_path):
    board, model = tensorrt_stand_in.Board(tmp_path / "board"), tiny_onnx(tmp_path / "tiny.onnx")
    code, out, err = jetson(board, model, "--json")
    assert code in (0, 6), err
    told = json.loads(out)
    made, built, timed = told["result"], told["built"], told["timed"]
    assert made["evidence"].startswith(("linted", "compiled_by_tensorrt_rtx(")) and "size_bytes" not in made
    assert (built["evidence"], built["mode"], built["alarms"]) == ("built_on_device", "strongly typed", [])
    assert built["size_bytes"] == (Path(told["engine"]) / "model.plan").stat().st_size
    assert built["identity"].keys() == {
        "onnx", "flags", "tensorrt", "compute_capability", "multiprocessors", "device", "l4t",
    }  # fmt: skip
    assert [(row["layer"], row["asked"], row["ran"]) for row in built["layers"]] == [
        ("kernel", "fp32", "fp32"), ("matrix", "fp32", "fp32"),
    ]  # fmt: skip
    assert timed["evidence"] == "measured_on_device"
    assert timed["engines"]["student"]["built"] == []  # it was sent, not built once more
    assert timed["engines"]["student"]["parts_ms"].keys() == {"copy_in", "compute", "copy_out"}
    assert timed["accuracy"]["student"]["score"] == 1 and timed["latency"]["student"]["p50_ms"] > 0
    # A second time, what is kept is sent and stands where it stood; the timing cache is kept too.
    again = json.loads(jetson(board, model, "--json")[1])
    assert (again["built"].pop("reused"), built.pop("reused")) == (True, False)
    assert (again["engine"], again["built"]) == (told["engine"], built)
    assert len(list((tmp_path / ".edgekd").glob("store/onnx-file-build/*"))) == 1
    assert not [file for file in (tmp_path / ".edgekd/work").rglob("*") if file.is_file() and file.name != "lock"]
    code, out, _ = jetson(board, model)
    (cache,) = (tmp_path / ".edgekd").glob("cache/timing-caches/*/timing.cache")
    assert code in (0, 6) and cache.read_bytes() == b"timed"
    assert out.splitlines()[0].startswith("tensorrt 10.3.0 on Stand-in, built in ")
    assert "built_on_device" in out and "copy in: " in out and "timed alone" in out


@needs_stand_in
def test_what_a_jetson_cannot_build_is_said_in_its_words(jetson, tmp_path):
    board, model = tensorrt_stand_in.Board(tmp_path / "board"), tiny_onnx(tmp_path / "tiny.onnx")
    board.fails_by("memory")
    code, out, err = jetson(board, model, "-q")
    assert (code, out) == (4, "")
    what, *_, log, fix = err.splitlines()
    assert what == f'error: no engine of {model} on "local:?python={board.python}": Cuda Runtime (out of memory)'
    assert Path(log.partition("all of it: ")[2]).is_file() and "workspace_mib" in fix
    assert not list((tmp_path / ".edgekd").glob("store/onnx-file-build/*"))


@needs_stand_in
def test_an_engine_that_is_built_anew_is_another_one(jetson, tmp_path, monkeypatch):
    board, model = tensorrt_stand_in.Board(tmp_path / "board", module=False), tiny_onnx(tmp_path / "tiny.onnx")
    first, second = (json.loads(jetson(board, model, "--json")[1]) for _ in range(2))
    assert first["engine"] == second["engine"]
    shutil.rmtree(tmp_path / ".edgekd/cache")
    third = json.loads(jetson(board, model, "--json")[1])
    assert third["engine"] != first["engine"] and not third["built"]["reused"]


@needs_stand_in
def test_a_jetson_with_trtexec_alone_is_timed_by_it(jetson, tmp_path):
    board = tensorrt_stand_in.Board(tmp_path / "board", module=False)
    code, out, err = jetson(board, tiny_onnx(tmp_path / "tiny.onnx"))
    assert code == 0, err
    assert "timed there, kernels alone: median 0.800 ms" in out.splitlines()
    assert "not timed; trtexec alone can run it there" in out.splitlines()


@needs_stand_in
def test_a_file_that_cannot_be_timed_is_built_all_the_same(jetson, tmp_path):
    board = tensorrt_stand_in.Board(tmp_path / "board")
    code, out, err = jetson(board, averaging(tmp_path / "model.onnx", classes=False))
    assert code == 0, err
    assert "answers one image with [1, 3, 1, 1]" in out and "built_on_device" in out


def test_without_a_board_it_is_prepared_and_its_commands_are_given(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = main("compile", tiny_onnx(tmp_path / "tiny.onnx"), "--target", "jetson")
    prepared, untimed, first, second, *timing, folder = out.splitlines()
    assert code == 0 and prepared.startswith("tensorrt 10.3.0, prepared; the board builds the engine; ")
    assert untimed == "not timed; name the board: --device ssh://USER@HOST"
    assert first == "  on the board:  cd engine && python3 -m on_device . && cd .."
    assert "trtexec --onnx=model.onnx --saveEngine=model.plan" in second
    assert [" --noDataTransfers" in line for line in timing] == [True, False]
    assert not (Path(folder) / "model.plan").exists() and (Path(folder) / "on_device").is_dir()


def test_what_tensorrt_would_refuse_is_not_sent(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_onnx(tmp_path / "tiny.onnx", operator="Det")
    code, out, err = main("compile", model, "--target", "jetson", "-q")
    assert (code, out) == (4, "")
    why = "activation: TensorRT has no Det; replace it in the network's forward"
    assert error(err) == f"error: backend tensorrt cannot run {model}: {why}"


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


@pytest.mark.parametrize(
    ("package", "arguments", "lines"),
    [
        ("onnx", ["compile"], ['error: backend "onnxruntime" cannot be used here: onnx not installed',
                               "fix:   pip install onnx"]),
        ("onnx", ["check"], ['error: backend "tensorrt" cannot be used here: onnx not installed',
                             "fix:   pip install onnx"]),
        ("openvino", ["compile", "--backend", "openvino"],
         ['error: backend "openvino" cannot be used here: openvino not installed',
          "fix:   pip install 'edgekd[openvino]'"]),
    ],
)  # fmt: skip
def test_a_backend_that_lacks_a_package_names_it(model, edgekd, tmp_path, package, arguments, lines):
    ran = edgekd(*arguments, model, env=without(package, tmp_path))
    what, _, fix = ran.stderr.splitlines()[-3:]
    assert (ran.returncode, [what, fix]) == (3, lines)


def test_a_recipe_can_be_compiled_by_another_backend_too(main, tiny, own_done):
    code, _, err = main("compile", "tiny.yaml", "--store", own_done.store, "--backend", "null", "-q")
    assert code == 0, err
    runs = sorted((own_done.store / "runs").iterdir())
    record = json.loads((runs[-1] / "run.json").read_text())
    assert record["target"]["backends"] == [{"null": {"latency_ms": 0.0}}]
    assert record["command"] == "edgekd compile tiny.yaml --target local --backend null"
