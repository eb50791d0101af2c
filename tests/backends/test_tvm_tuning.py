from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("tvm", reason="TVM is an extra: pip install 'edgekd[tvm]'")
pytest.importorskip("tvm_ffi")

from tvm import te, tirx

from edgekd import registry
from edgekd.backends.tvm import runner
from edgekd.backends.tvm.schedules import Plan, task_of
from edgekd.backends.tvm.tuning import BATCH, Budget, Records, Task, tune
from edgekd.errors import RecipeError, StageError

SHAPE = 1, 8, 8, 8


def create(**options):
    return registry.create("backend", "tvm", options=options)


def write_model(path, kernels, scale=1.0):
    """A row of 3x3 convolutions with 8 channels and ReLU on images of SHAPE."""
    rng, nodes, arrays, last = np.random.default_rng(len(kernels)), [], [], "x"
    for at, groups in enumerate(kernels):
        weight = scale * rng.standard_normal((8, 8 // groups, 3, 3)).astype(np.float32) / 8
        arrays.append(numpy_helper.from_array(weight, f"w{at}"))
        nodes.append(helper.make_node("Conv", [last, f"w{at}"], [f"c{at}"], pads=[1, 1, 1, 1], group=groups))
        nodes.append(helper.make_node("Relu", [f"c{at}"], [last := f"a{at}"]))
    nodes.append(helper.make_node("Flatten", [last], ["logits"]))
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 8 * 8 * 8))
    graph = helper.make_graph(nodes, "row", [image], [logits], arrays)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def tuned(path, out, kept, trials, **options):
    """The facts of tuning, after looking whether the engine computes what the model means; and what was told."""
    out.mkdir()
    backend, told = create(tuning={"trials": trials, "minutes": 1}, **options), []
    backend.kept, backend.on_progress = kept, lambda share, text: told.append((share, text))
    found = backend.compile(path, out, threads=1)["tuning"]
    assert (found["kept"] == "tuned") == (found["ratio"] is not None and found["ratio"]["median"] < 1)
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})
    np.testing.assert_allclose(runner.load(str(out)).run(x), expected, rtol=1e-4, atol=1e-5)
    return found, told


def test_results_serve_equal_kernels_of_other_models(tmp_path):
    first, told = tuned(write_model(tmp_path / "a.onnx", [1, 1]), tmp_path / "a", tmp_path / "kept", 12)
    assert (first["tasks"], first["trials"], first["known"]) == (1, 12, 0)
    assert told[-1][0] <= 1 and told[-1][1].startswith("tuning: trial ")
    other = write_model(tmp_path / "b.onnx", [1, 8], scale=2)
    second, _ = tuned(other, tmp_path / "b", tmp_path / "kept", 14)
    assert (second["tasks"], second["trials"], second["known"]) == (2, 14, 12)


def test_a_killed_search_goes_on_where_it_was(tmp_path):
    model, kept = write_model(tmp_path / "a.onnx", [1, 8]), tmp_path / "kept"
    (tmp_path / "killed").mkdir()
    code = (
        "import sys; from pathlib import Path; from edgekd import registry\n"
        "tvm = registry.create('backend', 'tvm', options={'tuning': 'full'}); tvm.kept = Path(sys.argv[2])\n"
        "tvm.compile(Path(sys.argv[1]), Path(sys.argv[3]), threads=1)"
    )
    argv = [sys.executable, "-c", code, str(model), str(kept), str(tmp_path / "killed")]
    process = subprocess.Popen(argv, start_new_session=True)
    try:
        until = time.monotonic() + 100
        while len(lines(kept)) < 2 + BATCH and time.monotonic() < until:
            time.sleep(0.05)
        assert process.poll() is None
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    known = len(lines(kept))
    found, _ = tuned(model, tmp_path / "again", kept, known + 3)
    assert known >= 2 + BATCH and (found["trials"], found["known"]) >= (known + 3, known)
    results = [json.dumps(json.loads(line)[:2]) for line in lines(kept)]
    assert len(set(results)) == len(results)


def lines(kept):
    files = list(kept.glob("*.jsonl"))
    return [line for line in files[0].read_text().splitlines() if line] if files else []


def test_a_line_cut_short_costs_its_result_alone(tmp_path):
    records = Records(tmp_path / "records")
    records.add("task", {Plan(1, 2, 3): 0.5, Plan(1, 1, 1, unroll=2): 0.25})
    (tmp_path / "records").write_text((tmp_path / "records").read_text()[:-5])
    Records(tmp_path / "records").add("other", {Plan(4, 4, 1): 1.0})
    assert Records(tmp_path / "records").known == {"task": {Plan(1, 2, 3): 0.5}, "other": {Plan(4, 4, 1): 1.0}}


def loop(name, factor, size):
    x = te.placeholder((size,), name=name)
    return te.create_prim_func([x, te.compute(x.shape, lambda i: x[i] * tirx.const(factor, "float32"), name="y")])


def test_a_task_is_what_a_kernel_computes_but_for_names_and_numbers():
    first, same, other = loop("lv3", 0.5, 8), loop("lv12", -1e-3, 8), loop("lv3", 0.5, 9)
    assert task_of(first) == task_of(same) != task_of(other)


class Priced:
    """A clock by which a plan's price is known, on a machine that becomes slower with every batch."""

    processor = None

    def __init__(self, prices):
        self.prices, self.batches = prices, 0

    def kernels(self, functions):
        self.batches += 1
        return [self.prices[function] * self.batches for function in functions]


def test_the_search_finds_the_best_plan_on_a_machine_that_becomes_slower(monkeypatch, tmp_path):
    plans = [Plan(rows, columns, 1) for rows in range(1, 7) for columns in range(1, 7)]
    prices = {plan: 1 + abs(plan.rows - 5) + abs(plan.columns - 4) for plan in plans}
    monkeypatch.setattr("edgekd.backends.tvm.tuning._scheduled", lambda function, plan, processor: plan)
    task = Task("task", None, plans, calls=1)
    chosen = tune([task], Priced(prices), Records(tmp_path / "records"), Budget(30, 1), lambda *found: None)
    assert chosen == {"task": Plan(5, 4, 1)}


@pytest.mark.parametrize("tuning", [{}, {"trials": 0}, {"rounds": 3}, {"minutes": -1.5}])
def test_what_is_no_budget_is_told(tuning):
    with pytest.raises(RecipeError) as caught:
        create(tuning=tuning)
    assert caught.value.what.startswith("backend tvm: tuning = {") and "is no budget" in caught.value.what
    assert caught.value.allowed == "none, quick, full, or {trials: N, minutes: M} with one or both, above 0"


def test_what_is_no_tracker_is_told():
    with pytest.raises(RecipeError, match="tracker = 'raspberry' is no address"):
        create(tracker="raspberry")


def test_an_engine_that_cannot_be_timed_here_is_not_tuned(tmp_path):
    (tmp_path / "out").mkdir()
    backend = create(arch="aarch64", cpu="cortex-a76", linker=sys.executable, tuning="quick")
    with pytest.raises(StageError, match=r"an engine for cortex-a76 cannot be timed here: name the tracker of a board"):
        backend.compile(write_model(tmp_path / "a.onnx", [1]), tmp_path / "out", threads=1)
