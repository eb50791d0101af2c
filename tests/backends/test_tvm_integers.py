from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("tvm", reason="TVM is an extra: pip install 'edgekd[tvm]'")
pytest.importorskip("tvm_ffi")

import tvm
from tvm import s_tir, te

from edgekd import registry
from edgekd.backends.tvm import runner
from edgekd.backends.tvm.clock import Clock
from edgekd.backends.tvm.forms import FormChooser
from edgekd.backends.tvm.origins import move_origins
from edgekd.backends.tvm.processor import processor_of
from edgekd.backends.tvm.segments import FORMS, Segments, lma, looked_up

SCALE, WEIGHT_SCALE = 0.05, 0.02


def codes_of(x):
    return np.clip(np.rint(x / np.float32(SCALE)), -128, 127)


def quantized_layer(path, shape, weight, operator, **attributes):
    """A layer between roundings: its output is in float."""
    constants = {"s": np.float32(SCALE), "z": np.int8(0), "w": weight.astype(np.int8)}
    constants["ws"], constants["wz"] = np.float32(WEIGHT_SCALE), np.int8(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
        helper.make_node(operator, ["xd", "wd"], ["y"], **attributes),
        helper.make_node("Flatten", ["y"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, None])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def engine_of(path, out, **options):
    facts = registry.create("backend", "tvm", options=options).compile(path, out, threads=1)
    return runner.load(str(out)), facts


def has_vnni():
    return {"avx512vnni", "avx512vl"} <= runner._instruction_sets()


@pytest.mark.parametrize(
    ("channels", "outputs", "groups"),
    [(6, 5, 1), (24, 24, 24), (12, 8, 4), (10, 32, 2), (8, 48, 8)],
    ids=["plain", "depthwise", "grouped", "grouped_wide", "multiplied"],
)
def test_integer_convolutions_sum_codes_exactly(tmp_path, channels, outputs, groups):
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (outputs, channels // groups, 3, 3))
    x = rng.standard_normal((1, channels, 6, 7)).astype(np.float32) * 3
    path = quantized_layer(tmp_path / "m.onnx", x.shape[1:], weight, "Conv", group=groups, pads=[1, 1, 1, 1])
    engine, facts = engine_of(path, tmp_path)
    padded = np.pad(codes_of(x), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    windows = windows.reshape(1, groups, channels // groups, 6, 7, 3, 3)
    kernels = weight.reshape(groups, outputs // groups, channels // groups, 3, 3)
    sums = np.einsum("bgchwij,gocij->bgohw", windows, kernels).reshape(1, -1)
    assert np.abs(sums).max() < 2**24  # so float32 holds them
    np.testing.assert_allclose(engine.run(x), sums * (SCALE * WEIGHT_SCALE), rtol=2e-7)
    if has_vnni():
        assert (facts["int8_kernels"], facts["unscheduled"]) == (1, [])


@pytest.mark.parametrize("transposed", [False, True])
def test_integer_matrix_products_sum_codes_exactly(tmp_path, transposed):
    rng = np.random.default_rng(1)
    matrix, x = rng.integers(-127, 128, (30, 19)), rng.standard_normal((1, 30)).astype(np.float32) * 3
    operator, attributes = ("Gemm", {"transB": 1}) if transposed else ("MatMul", {})
    path = quantized_layer(tmp_path / "m.onnx", (30,), matrix.T if transposed else matrix, operator, **attributes)
    engine, facts = engine_of(path, tmp_path)
    np.testing.assert_allclose(engine.run(x), codes_of(x) @ matrix * (SCALE * WEIGHT_SCALE), rtol=2e-7)
    if has_vnni():
        assert facts["int8_kernels"] == 1


def vector_loop(function, kind, count, lanes):
    """`function` over values, as one vector per iteration, compiled for this machine."""
    x = te.placeholder((count // lanes, lanes), name="x", dtype=kind)
    schedule = s_tir.Schedule(te.create_prim_func([x, te.compute(x.shape, lambda *at: function(x(*at)), name="y")]))
    schedule.vectorize(schedule.get_loops(schedule.get_sblock("y"))[-1])
    loop = tvm.compile(schedule.mod, target=processor_of("", "", 1).target()).jit()["main"]

    def run(values):
        values = values[: count // lanes * lanes].reshape(-1, lanes)
        y = tvm.runtime.tensor(np.zeros_like(values))
        loop(tvm.runtime.tensor(values), y)
        return y.numpy().reshape(-1)

    return run


def layer(k, continuous):
    rng = np.random.default_rng(k)
    cuts, slopes = np.linspace(-1.5, 2.0, k - 1).astype(np.float32), rng.standard_normal(k).astype(np.float32)
    biases = rng.standard_normal(k)
    if continuous:
        biases = 0.3 - np.concatenate([[0], np.cumsum(np.diff(slopes.astype(np.float64)) * cuts)])
    return Segments(cuts, slopes, biases.astype(np.float32))


@pytest.mark.parametrize("lanes", [1, 8, 16, 25])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_the_segments(form, lanes):
    width = processor_of("", "", 1).lanes
    layers = [layer(k, continuous=form == "sum") for k in (2, 4, 7, 8, 12, 16)]
    moved = layers[3].shifted(float(np.float32(layers[3].middle)))
    assert moved.seen_from_middle and not layers[3].seen_from_middle
    for segments in [*layers, moved]:
        if form not in segments.forms(width):
            continue
        x = np.random.default_rng(0).standard_normal(400).astype(np.float32) * 2
        x[:4] = -1e4, 1e4, 0, -0.0
        run = vector_loop(lambda one, s=segments: lma(one, form, s, width), "float32", 400, lanes)
        np.testing.assert_allclose(run(x), segments(x)[: 400 // lanes * lanes], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 0.3, -41.7])
def test_a_cut_belongs_to_the_left_segment(mean):
    cuts = np.float32([-1, 0, 1]) * np.float32(1.1) + np.float32(mean)
    segments = Segments(cuts, np.float32([0, 0, 0, 0]), np.float32([10, 20, 30, 40]))
    width = processor_of("", "", 1).lanes
    x = np.resize(np.concatenate((cuts, cuts + np.float32([0.001] * 3))), 48)
    for form in segments.forms(width):
        run = vector_loop(lambda one, form=form: lma(one, form, segments, width), "float32", 48, 16)
        np.testing.assert_array_equal(run(x)[:6], [10, 20, 30, 20, 30, 40])


BEFORE_LMA = """
<ir_version: 10, opset_import: ["": 20, "edgekd": 1]>
agraph (float[2, 3] x) => (float[2, 4] y)
<float[3, 4] weight = {1, 2, 3, 4, -1, -2, -3, -4, 1, 3, 5, 7}, float[4] bias = {1, 2, 3, 4},
 float[3] cuts = {-1, 0.5, 2}, float[4] slopes = {1, -1, 2, 0.5}, float[4] biases = {0, 1, 2, 3}>
{
    sums = Gemm <beta: float = 1.0> (x, weight, bias)
    y = edgekd.LMA (sums, cuts, slopes, biases)
}
"""


@pytest.mark.parametrize(
    ("old", "new", "moved"),
    [
        ("", "", True),
        ("beta: float = 1.0", "beta: float = 2.0", False),
        ("(float[2, 4] y)", "(float[2, 4] y, sums)", False),
    ],
    ids=["read_by_lma_alone", "a_factor_of_the_bias", "read_twice"],
)
def test_the_bias_before_lma_moves_its_origin(old, new, moved):
    graph = onnx.parser.parse_model(BEFORE_LMA.replace(old, new)).graph
    before = onnx.parser.parse_model(BEFORE_LMA.replace(old, new)).graph
    move_origins(graph, 16)
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32) * 3

    def computed(graph):
        numbers = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        gemm, layer = graph.node
        sums = x @ numbers[gemm.input[1]] + numbers[gemm.input[2]]
        segments = Segments(*(numbers[name] for name in layer.input[1:]))
        return segments(sums), segments.seen_from_middle

    (expected, _), (y, seen_from_middle) = computed(before), computed(graph)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert seen_from_middle == moved


@pytest.mark.parametrize("lanes", [1, 8, 16, 25])
def test_a_table_of_codes_is_looked_up(lanes):
    if not processor_of("", "", 1).looks_up_bytes:
        pytest.skip("this processor has no AVX-512 VBMI")
    table = np.random.default_rng(0).permutation(np.arange(-128, 128)).astype(np.int8)
    codes = np.resize(np.arange(-128, 128), 400).astype(np.int8)
    run = vector_loop(lambda one: looked_up(one, table), "int8", 400, lanes)
    np.testing.assert_array_equal(run(codes), table[codes.astype(int) + 128][: 400 // lanes * lanes])


def test_the_form_is_chosen_by_measuring_or_else_by_rule():
    processor = processor_of("", "", 1)
    segments = layer(8, continuous=True)
    measured, guessed = FormChooser(processor, Clock(processor)), FormChooser(processor, None)
    assert measured(segments) in FORMS
    (row,) = measured.chosen.values()
    assert set(row["over_relu"]) == set(segments.forms(processor.lanes)) and row["form"] in row["over_relu"]
    arm = FormChooser(processor_of("aarch64", "cortex-a76", 4), None)
    assert (guessed(segments), arm(segments)) == (next(segments.forms(processor.lanes)), "sum")
    assert arm(layer(8, continuous=False)) == "select"
