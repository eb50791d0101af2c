"""The device's half, without the device: stand-ins for libcudart and TensorRT, and the real one's interface."""

from __future__ import annotations

import ast
import ctypes
import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tensorrt_stand_in
from onnx import numpy_helper
from tiny_model import tiny_numpy, tiny_onnx

from edgekd.backends import Engine, load_runner
from edgekd.backends.tensorrt import ON_DEVICE, TensorRT, compiler
from edgekd.backends.tensorrt.on_device import build, layers
from edgekd.errors import MissingError, StageError
from edgekd.quantize import packing

X = np.random.default_rng(0).standard_normal((7, 3, 6, 6)).astype(np.float32)


@pytest.fixture
def board(tmp_path, monkeypatch):
    """TensorRT and CUDA as this process sees them."""
    if reason := tensorrt_stand_in.missing():
        pytest.skip(reason)
    made = tensorrt_stand_in.Board(tmp_path / "board")
    monkeypatch.syspath_prepend(made.folder)
    load = ctypes.CDLL  # this machine may have CUDA
    monkeypatch.setattr("ctypes.CDLL", lambda name: load(str(made.library) if "cudart" in str(name) else name))
    yield made
    forget()


@pytest.fixture
def bundle(make_onnx, tmp_path, monkeypatch):
    """What the host writes: bundle(option=...) is an engine that is not built yet."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(**options):
        out = tmp_path / "engine"
        out.mkdir(exist_ok=True)
        TensorRT(**{"max_batch": 4, **options}).compile(make_onnx(), out, threads=1)
        forget()
        return Engine("student", out, TensorRT.runner, "tensorrt")

    return make


def head(engine):
    """What the stand-in writes in front of its engine."""
    return json.loads((engine.folder / "model.plan").read_bytes().partition(b"\n")[0])


def table(engine):
    """Its layers, as the build left them."""
    return layers.rows_from_table(json.loads((engine.folder / "layers.json").read_text()))


def forget():
    """A device's process starts without these."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("on_device", "tensorrt")]:
        del sys.modules[name]


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_engine_is_built_where_it_runs_and_answers_in_any_batch(board, bundle, cuda_graph):
    engine = bundle(cuda_graph=cuda_graph)
    runner = load_runner(engine)
    logits = runner.run(X)  # more than max_batch: in parts of 4 and 3
    np.testing.assert_allclose(logits, tiny_numpy(X), rtol=1e-4, atol=1e-5)
    assert runner.facts["runtime"] == "tensorrt" and runner.facts["version"] == "10.3.0"
    assert runner.facts["mode"] == "strongly typed" and runner.facts["built"] == ["there is none"]
    assert runner.facts["parts_ms"] == {"copy_in": 1.0, "compute": 0.0, "copy_out": 1.0}
    assert runner.facts["identity"]["device"] == "Stand-in"
    assert runner.facts["identity"]["compute_capability"] == "8.7"
    built = json.loads((engine.folder / "build.json").read_text())
    assert built["refused"] == [] and built["identity"]["multiprocessors"] == 8
    assert [row["name"] for row in table(engine)] == ["conv", "classifier"]
    assert (engine.folder / "timing.cache").read_bytes() == b"timed"


def test_a_graph_is_launched_after_the_first_query_of_a_size(board, bundle):
    runner = load_runner(bundle(cuda_graph=True))
    launches = runner._cuda._library.launches
    before = launches()
    for _ in range(3):
        runner.run(X[:2])
    assert launches() - before == 2


def test_an_engine_that_fits_is_not_built_again(board, bundle):
    engine = bundle()
    load_runner(engine)
    plan = (engine.folder / "model.plan").stat().st_mtime_ns
    forget()
    assert load_runner(engine).facts["built"] == []
    assert (engine.folder / "model.plan").stat().st_mtime_ns == plan


def test_an_engine_that_does_not_fit_is_never_run_but_built_again(board, bundle):
    engine = bundle()
    load_runner(engine)

    def another(name, value, file="build.json"):
        content = json.loads((engine.folder / file).read_text())
        (content["identity"] if file == "build.json" else content)[name] = value
        (engine.folder / file).write_text(json.dumps(content))

    for change, why in (
        (lambda: (engine.folder / "model.plan").write_bytes(b"{}"), ["its file is damaged, or was not built here"]),
        (lambda: another("tensorrt", "10.2.0"), ["tensorrt was 10.2.0 and is 10.3.0"]),
        (lambda: another("device", "Orin"), ["device was Orin and is Stand-in"]),
        (lambda: another("multiprocessors", 16), ["multiprocessors was 16 and is 8"]),
        (lambda: another("l4t", "35.4.1"), ["l4t was 35.4.1 and is None"]),
        (lambda: another("optimization_level", 5, "engine.json"), ["flags changed"]),
        (lambda: tiny_onnx(engine.folder / "model.onnx", operator="Sigmoid"), ["onnx changed"]),
    ):
        change()
        forget()
        assert load_runner(engine).facts["built"] == why


def test_a_graph_that_cannot_be_typed_strongly_is_built_by_flags(board, bundle):
    board.fails_by("untyped")
    engine = bundle(workspace_mib=64)
    assert load_runner(engine).facts["mode"] == "flags"
    built = json.loads((engine.folder / "build.json").read_text())
    assert [one["mode"] for one in built["tried"]] == ["strongly typed"]
    assert head(engine)["calls"][0] == ["set_memory_pool_limit", 0, 64 << 20]


def test_a_gpu_that_tensorrt_cannot_use_is_said(board, bundle):
    board.fails_by("no gpu")
    with pytest.raises(RuntimeError, match=r"TensorRT 10\.3\.0 cannot build it: TensorRT finds no GPU that it can use"):
        load_runner(bundle())


def test_a_board_that_is_out_of_memory_says_so(board, bundle):
    with pytest.raises(RuntimeError, match=r"cudaMalloc: out of memory \(error 2\)"):
        load_runner(bundle(max_batch=1 << 24))


def test_images_of_another_size_are_refused(board, bundle):
    runner = load_runner(bundle())
    with pytest.raises(RuntimeError, match=r"the engine takes \[-1, 3, 6, 6\], not \[1, 3, 5, 5\]"):
        runner.run(np.zeros((1, 3, 5, 5), np.float32))


@pytest.mark.parametrize("file", [TensorRT.runner, *ON_DEVICE.glob("*.py")], ids=lambda file: file.stem)
def test_what_is_copied_is_python_3_8(file):
    ast.parse(file.read_text(), feature_version=(3, 8))


def test_without_tensorrt_the_package_is_named(bundle, monkeypatch):
    engine = bundle()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        RuntimeError, match=r"the Python module tensorrt is not here .*python3-libnvinfer; before TensorRT 8\.5"
    ):
        load_runner(engine)


def test_what_an_accelerator_left_to_the_gpu_is_said(board, bundle):
    engine = bundle(dla_core=1)
    load_runner(engine)
    assert layers.on_the_gpu(table(engine)) == ["classifier"]
    assert ["set_flag", 2] in head(engine)["calls"]


def test_building_ahead_of_the_run_ends_in_an_engine_or_a_sentence(board, bundle, monkeypatch, capsys):
    engine = bundle()
    command = importlib.import_module("edgekd.backends.tensorrt.on_device.__main__").main
    assert command([str(engine.folder)]) == 0
    assert load_runner(engine).facts["built"] == []

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", absent)
    capsys.readouterr()
    assert command([str(engine.folder)]) == 1
    assert capsys.readouterr().err.endswith(
        "libcudart is not here; it is a part of JetPack: sudo apt install nvidia-jetpack\n"
    )


def test_without_module_and_trtexec_both_are_named(bundle, monkeypatch, capsys):
    engine = bundle()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("edgekd.backends.tensorrt.on_device.__main__.find_trtexec", lambda: None)
    command = importlib.import_module("edgekd.backends.tensorrt.on_device.__main__").main
    assert command([str(engine.folder)]) == 1
    assert capsys.readouterr().err.startswith("neither the Python module tensorrt nor trtexec is here: ")


# ---------------------------------------------------------------- the layer table

FUSED = {
    "Name": "conv + relu", "LayerType": "CaskConvolution", "TacticName": "imma_8816",
    "Inputs": [{"Name": "a", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
    "Outputs": [{"Name": "b", "Format/Datatype": "Row major linear FP16 format"}],
    "Weights": {"Type": "Int8", "Count": 432}, "Bias": {"Type": "Float", "Count": 16},
}  # fmt: skip
NAMED = {
    "Name": "kernel", "LayerType": "correlation", "Inputs": [{"Datatype": "Int8"}], "Outputs": [{"Datatype": "Float"}],
    "Constants": [{"Datatype": "Int8"}, {"Datatype": "Float"}], "Metadata": "[ONNX Layer: conv]\x1e[ONNX Layer: relu]",
}  # fmt: skip


@pytest.mark.parametrize("layer", [FUSED, NAMED], ids=["older", "newer"])
def test_layers_are_read_as_older_and_newer_releases_write_them(layer):
    (kernel,) = compiler.kernels_from_rows(layers.rows_from_table({"Layers": [layer], "Bindings": []}))
    assert kernel.nodes == ("conv", "relu") and kernel.inputs == ("Int8",)
    assert kernel.multiplies_integers


def test_layers_of_an_accelerator_and_copies_to_it_are_not_on_the_gpu():
    rows = [{"name": kind, "type": kind} for kind in ("DLA", "Reformat", "CaskConvolution", "NoOp")]
    assert layers.on_the_gpu(rows) == ["CaskConvolution", "NoOp"]


# ---------------------------------------------------------------- how precision is asked for


def module(builder, network):
    return SimpleNamespace(
        BuilderFlag=SimpleNamespace(**dict.fromkeys(builder, 1)),
        NetworkDefinitionCreationFlag=SimpleNamespace(**dict.fromkeys(network, 1)),
    )


@pytest.mark.parametrize(
    ("trt", "expected"),
    [
        (module(("INT8", "FP16"), ("EXPLICIT_BATCH",)), [("flags", ("INT8", "FP16"))]),  # 8.x
        (
            module(("INT8", "FP16"), ("EXPLICIT_BATCH", "STRONGLY_TYPED")),
            [("strongly typed", ()), ("flags", ("INT8", "FP16"))],
        ),
        (module((), ("STRONGLY_TYPED",)), [("types of the graph", ())]),  # 11
    ],
)
def test_precision_is_asked_for_by_what_the_module_has(trt, expected):
    assert [(mode.name, mode.builder) for mode in build.modes(trt, "int8")] == expected


@pytest.mark.skipif(bool(compiler.missing()), reason=f"extra trt-check: {compiler.missing()}")
def test_the_real_module_has_all_that_is_called():
    trt = importlib.import_module(compiler.MODULE)
    assert [mode.name for mode in build.modes(trt, "int8")] == ["types of the graph"]
    for thing, names in {
        trt.Runtime: ("deserialize_cuda_engine",),
        trt.ICudaEngine: (
            "num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_shape", "create_execution_context",
            "create_engine_inspector",
        ),
        trt.IExecutionContext: ("execute_async_v3", "set_tensor_address", "set_input_shape"),
        trt.EngineInspector: ("get_engine_information",),
        trt.IBuilderConfig: (
            "set_memory_pool_limit", "builder_optimization_level", "create_timing_cache", "set_timing_cache",
            "get_timing_cache", "profiling_verbosity", "set_flag", "default_device_type", "DLA_core",
            "add_optimization_profile",
        ),
        trt.BuilderFlag: ("GPU_FALLBACK",),
        trt.OnnxParser: ("parse_from_file", "set_flag", "num_errors", "get_error"),
        trt.OnnxParserFlag: ("ADJUST_FOR_DLA",),
        trt.TensorIOMode: ("INPUT", "OUTPUT"),
        trt.LayerInformationFormat: ("JSON",),
    }.items():  # fmt: skip
        assert [name for name in names if not hasattr(thing, name)] == []


# ---------------------------------------------------------------- the host's half


def test_the_bundle_holds_the_model_as_the_release_reads_it(make_onnx, tmp_path):
    facts = TensorRT(version="8.2.1").compile(make_onnx(), tmp_path, threads=1)
    assert facts["opset"] == onnx.load(tmp_path / "model.onnx").opset_import[0].version == 13
    settings = json.loads((tmp_path / "engine.json").read_text())
    assert set(settings) == set(build.SETTINGS)
    assert (settings["precision"], settings["profile"], settings["module"]) == ("fp32", "image:1x3x6x6", "tensorrt")
    assert (tmp_path / "on_device" / "__main__.py").is_file()
    assert not list(tmp_path.rglob("__pycache__"))


def test_what_the_release_would_reject_is_said_before_anything_is_sent(make_onnx, tmp_path):
    (problem,) = TensorRT(version="8.6.2").check(make_onnx(operator="Hardmax", opset=17))
    assert problem.startswith("activation: Hardmax is taken from TensorRT 10.0 on, not by 8.6.2; ")
    (problem,) = TensorRT().check(make_onnx(operator="Magic", domain="my.ops"))
    assert problem == "the model has operators of the domain my.ops, for which TensorRT has no plugin"
    with pytest.raises(StageError, match="for which TensorRT has no plugin"):
        TensorRT().compile(make_onnx(operator="Magic", domain="my.ops"), tmp_path, threads=1)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_unpacked_for_it(make_onnx, tmp_path, bits):
    """A student of `quantized_distillation`, as its file is: codes in UINT8, and a function that unpacks them."""
    file = make_onnx()
    model = onnx.load(file)
    codes = np.arange(108, dtype=np.uint8).reshape(1, 108) % 16
    one, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    packed = packing.Packed(bits, codes, one / 8, zero - 1, (4, 3, 3, 3), np.ones((), np.float32))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(packed.weight(), "kernel"))
    packed_model = packing.with_packed(model, {"kernel": packed})
    assert packed_model.graph.node[0].op_type == f"Unpack{bits}"
    onnx.save(packed_model, file)
    assert TensorRT().check(file) == []
    TensorRT().compile(file, tmp_path, threads=1)
    constants = {one.name: numpy_helper.to_array(one) for one in onnx.load(tmp_path / "model.onnx").graph.initializer}
    np.testing.assert_array_equal(constants["kernel"], packed.weight())


def test_without_onnx_the_pip_line_is_given(make_onnx, tmp_path, monkeypatch):
    model = make_onnx()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match="pip install onnx"):
        TensorRT().compile(model, tmp_path, threads=1)
