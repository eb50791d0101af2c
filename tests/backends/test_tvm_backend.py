from __future__ import annotations

import json
import platform
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_model import tiny_onnx

pytest.importorskip("tvm", reason="TVM is an extra: pip install 'edgekd[tvm]'")
pytest.importorskip("tvm_ffi")

from edgekd import registry
from edgekd.activations import FORMS, multi_segment_layers
from edgekd.backends.tvm import runner
from edgekd.backends.tvm.schedules import tiles
from edgekd.errors import MissingError, StageError
from edgekd.export import export
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


def joined_model(path, shape, branches, batch="batch"):
    """Branches (nodes from "x" to the branch's name, arrays by name), each flattened, joined to one output."""
    nodes, arrays = [], {}
    for name, (part, constants) in branches.items():
        nodes += [*part, helper.make_node("Flatten", [name], [f"{name}.flat"])]
        arrays |= constants
    nodes.append(helper.make_node("Concat", [f"{name}.flat" for name in branches], ["logits"], axis=1))
    graph = helper.make_graph(
        nodes,
        "joined",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, None])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def agrees_with_onnxruntime(path, out, shape, batches, threads=1, **options):
    out.mkdir()
    facts = create(**options).compile(path, out, threads=threads)
    opened, reference = runner.load(str(out)), onnxruntime.InferenceSession(str(path))
    for batch in batches:
        x = np.random.default_rng(batch).standard_normal((batch, *shape)).astype(np.float32)
        np.testing.assert_allclose(opened.run(x), reference.run(None, {"x": x})[0], rtol=1e-4, atol=2e-5)
    return facts


def convolution(name, channels, out, kernel, bias=True, group=1, **attributes):
    rng = np.random.default_rng(len(name))
    arrays = {f"{name}.w": rng.standard_normal((out, channels // group, *kernel)).astype(np.float32) / 4}
    if bias:
        arrays[f"{name}.b"] = rng.standard_normal(out).astype(np.float32)
    return [helper.make_node("Conv", ["x", *arrays], [name], group=group, **attributes)], arrays


CONVOLUTIONS = {
    "plain": convolution("plain", 12, 16, (3, 3), pads=[1, 1, 1, 1]),
    "odd": convolution("odd", 12, 25, (5, 5), pads=[2, 2, 2, 2]),
    "few": convolution("few", 12, 5, (3, 3), bias=False),
    "pointwise": convolution("pointwise", 12, 40, (1, 1)),
    "strided": convolution("strided", 12, 24, (3, 3), strides=[2, 2], pads=[0, 1, 1, 0]),
    "dilated": convolution("dilated", 12, 8, (3, 3), dilations=[2, 1], pads=[2, 1, 2, 1]),
    "oblong": convolution("oblong", 12, 8, (1, 5), strides=[1, 2]),
    "grouped": convolution("grouped", 12, 18, (3, 3), group=3, pads=[1, 1, 1, 1]),
    "depthwise": convolution("depthwise", 12, 12, (3, 3), group=12, pads=[1, 1, 1, 1], strides=[2, 2]),
    "multiplied": convolution("multiplied", 12, 24, (3, 3), group=12),
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("cpu", "threads"), [("", 1), ("", 2), slow("x86-64-v3", 1), slow("x86-64-v2", 1)])
def test_every_kind_of_convolution_agrees_with_onnxruntime(tmp_path, cpu, threads):
    if cpu and platform.machine() != "x86_64":
        pytest.skip("another architecture")
    path = joined_model(tmp_path / "convolutions.onnx", (12, 9, 14), CONVOLUTIONS)
    facts = agrees_with_onnxruntime(path, tmp_path / "engine", (12, 9, 14), [1, 3], threads, cpu=cpu)
    assert facts["unscheduled"] == [] and facts["threads"] == threads


def operator(name, kind, *others, arrays=None, **attributes):
    inputs = ["", *others]
    inputs[0] = "c"
    return name, kind, inputs, arrays or {}, attributes


per_channel = np.linspace(-1, 1, 8, dtype=np.float32)
OPERATORS = [
    operator("relu", "Relu"), operator("sigmoid", "Sigmoid"), operator("swish", "HardSwish"), operator("tanh", "Tanh"),
    operator("leaky", "LeakyRelu", alpha=0.1), operator("identity", "Identity"),
    operator("clip", "Clip", "low", "high", arrays={"low": np.float32(-0.5), "high": np.float32(6)}),
    operator("clip_below", "Clip", "low0", arrays={"low0": np.float32(0)}),
    operator("maximum", "Max", "cut", arrays={"cut": np.float32(0.25)}),
    operator("scaled", "Mul", "slopes", arrays={"slopes": per_channel.reshape(1, 8, 1, 1)}),
    operator("moved", "Add", "offsets", arrays={"offsets": per_channel.reshape(8, 1, 1)}),
    operator("prelu", "PRelu", "slope", arrays={"slope": per_channel.reshape(8, 1, 1)}),
    operator("norm", "BatchNormalization", "g", "b", "m", "v", epsilon=1e-3,
             arrays={"g": per_channel + 2, "b": per_channel, "m": per_channel / 2, "v": per_channel + 1.5}),
    operator("max_pool", "MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
    operator("max_pool_padded", "MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    operator("average_pool", "AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    operator("average_of_all", "AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    operator("mean", "ReduceMean", "axes", keepdims=0, arrays={"axes": np.array([-1, 2])}),
    operator("channel_mean", "ReduceMean", "channel", arrays={"channel": np.array([1])}),
    operator("global", "GlobalAveragePool"),
    operator("sliced", "Slice", "starts", "ends", "axis", "steps",
             arrays={"starts": np.array([0, 1]), "ends": np.array([2**31, 7]), "axis": np.array([2, 3]),
                     "steps": np.array([2, 2])}),
    operator("padded", "Pad", "pads", arrays={"pads": np.array([0, 4, 0, 1, 0, 4, 2, 0])}),
    operator("joined", "Concat", "x", axis=1), operator("moved_axes", "Transpose", perm=[0, 2, 3, 1]),
    operator("softmax", "Softmax", axis=1),
]  # fmt: skip


def test_every_operator_with_the_channels_last_agrees_with_onnxruntime(tmp_path):
    kernel = np.random.default_rng(0).standard_normal((8, 6, 3, 3)).astype(np.float32) / 4
    branches = {"c": ([helper.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1])], {"k": kernel})}
    for name, kind, inputs, arrays, attributes in OPERATORS:
        branches[name] = ([helper.make_node(kind, inputs, [name], **attributes)], arrays)
    path = joined_model(tmp_path / "operators.onnx", (6, 8, 10), branches)
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
    with pytest.raises(StageError, match=r"pentium9 is no CPU of x86_64 that LLVM knows: .*znver4"):
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


def stack(path, activation, form="where", **options):
    """Two convolutions with an activation behind each, and a residual."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1)]
    activations = [registry.create("activation", activation, 8, options=options) for _ in layers]

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.activations = torch.nn.ModuleList(layers), torch.nn.ModuleList(activations)

        def forward(self, x):
            first = self.activations[0](self.layers[0](x))
            return self.activations[1](self.layers[1](first) + first).mean((2, 3))

    network = Stack().eval()
    for _, layer in multi_segment_layers(network):
        torch.nn.init.normal_(layer.slope_deltas, 0, 0.3)
        torch.nn.init.normal_(layer.biases, 0, 0.1)
    example = np.zeros((1, 3, 8, 8), np.float32)
    export(network, path, example=example, opset=20, dynamic_batch=False, form=form, metadata={})
    return path


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
