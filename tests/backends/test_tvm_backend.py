from __future__ import annotations

import json
import platform
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from tiny_model import tiny_onnx
from tvm_models import CONVOLUTIONS, joined_model, operators_model, stack

pytest.importorskip("tvm", reason="TVM is an extra: pip install 'edgekd[tvm]'")
pytest.importorskip("tvm_ffi")

from edgekd import registry
from edgekd.activations import FORMS
from edgekd.backends.tvm import runner
from edgekd.backends.tvm.schedules import tiles
from edgekd.errors import MissingError, StageError
from edgekd.quantize import ptq


def create(**options):
    return registry.create("backend", "tvm", options=options)


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory):
    """A folder with an engine of tiny_onnx with a free batch size, and what compile said of it."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "engine").mkdir()
    facts = create().compile(tiny_onnx(folder / "tiny.onnx"), folder / "engine", threads=1)
    return folder / "engine", facts


@pytest.fixture
def own_engine(tiny_engine, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(tiny_engine[0], tmp_path / "own")


def change(engine, **settings):
    known = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps(known | settings))


def agrees_with_onnxruntime(path, out, shape, batches, threads=1, **options):
    out.mkdir()
    facts = create(**options).compile(path, out, threads=threads)
    opened, reference = runner.load(str(out)), onnxruntime.InferenceSession(str(path))
    for batch in batches:
        x = np.random.default_rng(batch).standard_normal((batch, *shape)).astype(np.float32)
        np.testing.assert_allclose(opened.run(x), reference.run(None, {"x": x})[0], rtol=1e-4, atol=2e-5)
    return facts


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("cpu", "threads"), [("", 1), ("", 2), slow("x86-64-v3", 1), slow("x86-64-v2", 1)])
def test_every_kind_of_convolution_agrees_with_onnxruntime(tmp_path, cpu, threads):
    if cpu and platform.machine() != "x86_64":
        pytest.skip("another architecture")
    path = joined_model(tmp_path / "convolutions.onnx", (12, 9, 14), CONVOLUTIONS)
    facts = agrees_with_onnxruntime(path, tmp_path / "engine", (12, 9, 14), [1, 3], threads, cpu=cpu)
    assert facts["unscheduled"] == [] and facts["threads"] == threads


def test_every_operator_with_the_channels_last_agrees_with_onnxruntime(tmp_path):
    path = operators_model(tmp_path / "operators.onnx", (6, 8, 10))
    agrees_with_onnxruntime(path, tmp_path / "engine", (6, 8, 10), [1, 2])


def test_dense_layers_agree_with_onnxruntime(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in {"w": (300, 23), "b": (300,), "matrix": (300, 7), "one": (300, 1)}.items()
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["hidden"], transB=1),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "matrix"], ["many"]),
        helper.make_node("MatMul", ["active", "one"], ["single"]),
        helper.make_node("Concat", ["many", "single"], ["dense"], axis=1),
    ]
    path = joined_model(tmp_path / "dense.onnx", (23,), {"dense": (nodes, arrays)})
    agrees_with_onnxruntime(path, tmp_path / "engine", (23,), [1, 4])


def test_what_the_engine_says_of_itself(tiny_engine, expected):
    engine, facts = tiny_engine
    opened = runner.load(str(engine))
    x = np.random.default_rng(1).standard_normal((7, 3, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(opened.run(x), expected(x), rtol=1e-4, atol=1e-5)
    assert opened.facts == {name: facts[name] for name in ("runtime", "version", "providers", "threads")}


def test_compiling_again_makes_the_same_engine(tiny_engine, make_onnx, tmp_path):
    create().compile(make_onnx(), tmp_path, threads=1)
    assert (tmp_path / "engine.json").read_text() == (tiny_engine[0] / "engine.json").read_text()


@pytest.mark.parametrize(
    ("rows", "columns", "vectors", "registers"),
    [(32, 32, 1, 32), (8, 8, 4, 32), (8, 8, 4, 16), (7, 13, 3, 32), (1, 1, 80, 16)],
)
def test_a_tile_divides_the_image_and_stays_in_the_registers(rows, columns, vectors, registers):
    guess, *others = tiles(rows, columns, vectors, registers)
    assert registers / 4 <= guess.sums
    for tile in [guess, *others]:
        assert (rows % tile.rows, columns % tile.columns, vectors % tile.vectors) == (0, 0, 0)
        assert tile.sums + tile.vectors < registers


def test_a_truncated_engine_is_refused(own_engine):
    library = own_engine / "model.so"
    library.write_bytes(library.read_bytes()[:-100])
    with pytest.raises(runner.EngineError, match=r"model\.so is damaged: it is not the file that was compiled"):
        runner.load(str(own_engine))


def test_an_engine_for_another_machine_is_refused(own_engine):
    change(own_engine, arch="sparc")
    with pytest.raises(runner.EngineError, match=f"this engine is for sparc, this machine is {platform.machine()}"):
        runner.load(str(own_engine))


def test_an_engine_for_a_newer_processor_is_refused(own_engine):
    change(own_engine, cpu="future", needs=["avx1024"])
    with pytest.raises(runner.EngineError, match="this engine is for future, this processor has no avx1024"):
        runner.load(str(own_engine))


def test_an_unsupported_operator_is_named(tmp_path, make_onnx):
    node = helper.make_node("Bernoulli", ["x"], ["random"])
    path = joined_model(tmp_path / "random.onnx", (3,), {"random": ([node], {})})
    (problem,) = create().check(path)
    assert problem.startswith("tvm cannot compile random.onnx: ") and problem.endswith("Bernoulli")
    with pytest.raises(StageError, match=r"tvm cannot compile .*random\.onnx: .*Bernoulli"):
        create().compile(path, tmp_path, threads=1)


def test_a_processor_that_does_not_exist_is_refused(make_onnx, tmp_path):
    with pytest.raises(StageError, match=r"pentium9 is no CPU of x86_64 among the \d+ that LLVM knows, as pentium"):
        create(arch="x86_64", cpu="pentium9").compile(make_onnx(), tmp_path, threads=1)


def test_an_architecture_that_nothing_links_for_is_refused(make_onnx, tmp_path):
    with pytest.raises(StageError, match="nothing links for aarch64: no-such-g"):
        create(arch="aarch64", cpu="cortex-a76", linker="no-such-g++").compile(make_onnx(), tmp_path, threads=1)


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no aarch64-linux-gnu-g++")
@pytest.mark.parametrize("cpu", [slow("cortex-a72"), "cortex-a76"])
def test_it_compiles_for_a_raspberry_pi(make_onnx, tmp_path, cpu):
    create(arch="aarch64", cpu=cpu).compile(make_onnx(), tmp_path, threads=4)
    aarch64 = 183
    assert int.from_bytes((tmp_path / "model.so").read_bytes()[18:20], "little") == aarch64
    assert json.loads((tmp_path / "engine.json").read_text())["arch"] == "aarch64"


def test_a_compiler_that_takes_too_long_is_ended(make_onnx, tmp_path):
    backend = create(timeout=0.01)
    backend.log = tmp_path / "tvm.log"
    with pytest.raises(StageError) as caught:
        backend.compile(make_onnx(), tmp_path, threads=1)
    assert caught.value.what.startswith("tvm, compiling ") and "it did not end within 0.01 s" in caught.value.what
    assert f"all of them: {tmp_path / 'tvm.log'}" in caught.value.allowed and backend.log.is_file()


def test_without_tvm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError) as caught:
        create().require()
    assert "apache-tvm and apache-tvm-ffi and onnx not installed" in caught.value.what
    assert caught.value.fix == "pip install 'edgekd[tvm]'"


@pytest.fixture(scope="module")
def relu_kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relu")
    return create().compile(stack(folder / "relu.onnx", "relu"), folder, threads=1)["kernels"]


@pytest.mark.parametrize("form", ["function", "where", slow("relu_sum"), slow("step_sum"), slow("clip_sum")])
def test_lma_becomes_part_of_the_convolutions_loop(tmp_path, form, relu_kernels):
    continuous = FORMS[form].exact_for == "continuous"
    path = stack(tmp_path / "lma.onnx", "lma", form, k=8, continuous=continuous)
    facts = create().compile(path, tmp_path, threads=1)
    assert (facts["kernels"], facts["unscheduled"]) == (relu_kernels, [])
    assert [(row["segments"], row["form"] in row["over_relu"]) for row in facts["lma"]] == [(8, True)] * (
        form == "function"
    )
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(str(path)).run(None, {"images": x})
    np.testing.assert_allclose(runner.load(str(tmp_path)).run(x), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("activation", ["relu", "lma"])
def test_int8_models_are_computed_in_integers(tmp_path, activation, relu_kernels):
    path = stack(tmp_path / "float.onnx", activation, "function")
    rng = np.random.default_rng(0)
    prepared = ptq.prepare(path, rng.standard_normal((16, 3, 8, 8)).astype(np.float32))
    model = prepared.quantized("minmax", 100)
    onnx.save(model, tmp_path / "int8.onnx")
    facts = create().compile(tmp_path / "int8.onnx", tmp_path, threads=1)
    if {"avx512vnni", "avx512vl"} <= runner._instruction_sets():
        assert (facts["int8_kernels"], facts["kernels"]) == (2, relu_kernels)
    x = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"images": x})
    constants = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    scales = [constants[node.input[1]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    code = max(float(scale) for scale in scales if scale.ndim == 0)
    assert np.abs(runner.load(str(tmp_path)).run(x) - expected).max() <= code
