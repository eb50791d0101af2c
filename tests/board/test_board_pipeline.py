"""From nothing to a report of an INT8 student on aarch64, by ONNX Runtime and by TVM's cross-compiler."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from tiny_job import SPREAD

from edgekd import pipeline
from edgekd.artifact import Store

pytestmark = [pytest.mark.board, pytest.mark.slow, pytest.mark.timeout(1800)]
SAMPLES = 60
# Sums in another order than on x86: some units in the last place of float32. In INT8 that may move a code to its
# neighbour, a logit by much more, and an answer: of one image in sixty at most.
TOLERANCE = 1e-4
TURNED = 1
SMALL = (
    "data.train_limit=400", "data.test_limit=60", "teacher.depth=8", "teacher.width=0.25", "teacher.train.epochs=2",
    "student.width=0.25", "distill.train.epochs=2", "distill.scratch=false", "quantize.method=ptq",
    "quantize.calibration_images=64", "benchmark.seconds=0.2", "benchmark.launches=6",
)  # fmt: skip
PI_BY_TVM = "name: pi-tvm\nbackends: [{tvm: {arch: aarch64, cpu: cortex-a76}}]\n"


@pytest.fixture
def devices(board, tmp_path, monkeypatch):
    """The board under two names: as a target of ONNX Runtime, and of TVM."""
    monkeypatch.chdir(tmp_path)
    lines = [f'  {name}: {{url: "{board.url}", target: {target}}}' for name, target in
             (("ort", "raspberry-pi-5"), ("tvm", "./pi-tvm.yaml"))]  # fmt: skip
    (tmp_path / "pi-tvm.yaml").write_text(PI_BY_TVM)
    (tmp_path / "devices.yaml").write_text("\n".join(["devices:", *lines]))
    return tmp_path


def logits_of(store, run, stage, name):
    key = json.loads((store / "runs" / run / "run.json").read_text())["artifacts"][stage]
    return np.load(store / "store" / stage / key / name)


def compare_with_the_host(store, run, name, scores):
    """The teacher, in float, gives the host's logits; the student, in INT8, its answers."""
    there = logits_of(store, run, "bench", "teacher_logits.npy")
    here = logits_of(store, run, "teacher", "test_logits.npy")
    np.testing.assert_allclose(there, here[: len(there)], rtol=TOLERANCE, atol=TOLERANCE)
    # ONNX Runtime's own engine runs here too; what is compiled for ARM does not: it must do what the model says.
    stage, rung = {"ort": ("engine-student", "engine"), "tvm": ("quantize", "quantized")}[name]
    there = logits_of(store, run, "bench", "student_logits.npy")
    here = logits_of(store, run, stage, "test_logits.npy")[: len(there)]
    assert (there.argmax(axis=1) != here.argmax(axis=1)).sum() <= TURNED
    assert abs(scores["device"] - scores[rung]) <= TURNED / SAMPLES


def test_digits_on_a_raspberry_pi(devices, main):
    pytest.importorskip("tvm", reason="TVM is an extra: pip install 'edgekd[tvm]'")
    if not shutil.which("aarch64-linux-gnu-g++"):
        pytest.skip("nothing links for aarch64: apt-get install g++-aarch64-linux-gnu")
    sets = [word for one in SMALL for word in ("--set", one)]
    code, out, err = main("run", "digits", "--device", "all", "--json", *sets)
    assert code == 6, err
    document = json.loads(out)
    rows = {row["name"]: row for row in document["boards"]}
    assert {name: row["target"] for name, row in rows.items()} == {"ort": "raspberry-pi-5", "tvm": "pi-tvm"}
    store = devices / ".edgekd"
    for name, row in rows.items():
        report = json.loads((store / "runs" / document["run_id"] / name / "report.json").read_text())
        assert report["verdict"]["status"] == "INVALID"
        assert "emulated: aarch64 is emulated there, its times are not a board's" in report["verdict"]["reasons"]
        assert (row["model"], row["n"]) == ("Raspberry Pi 5 Model B Rev 1.0", SAMPLES)
        assert report["environment"]["device"]["machine"] == "aarch64"
        assert report["environment"]["engines"]["student"]["runtime"] == {"ort": "onnxruntime", "tvm": "tvm"}[name]
        compare_with_the_host(store, row["run_id"], name, {one["rung"]: one["score"] for one in report["ladder"]})
    assert err.count("[1/") >= 1 and err.count(" teacher          done") == 1, "the teacher is trained once"


def test_a_part_of_a_spread_student_runs_on_a_raspberry_pi(devices, main):
    (devices / "spread.yaml").write_text(SPREAD)
    given = ("--device", "local:", "--device", "ort", "--device", "local:")
    code, out, err = main("run", "spread.yaml", *given, "--json")
    assert code == 0, err
    document = json.loads(out)
    _, board, _ = document["spread_run"]["boards"]
    assert (board["status"], board["target"]) == ("INVALID", "raspberry-pi-5")
    assert "emulated: aarch64 is emulated there, its times are not a board's" in board["reasons"]
    _, artifacts = pipeline.recorded(Store(devices / ".edgekd"), document["run_id"])
    answered, here = (np.load(artifacts[name].file("test_features.npy")) for name in ("boards", "parts"))
    np.testing.assert_allclose(answered, here, rtol=1e-3, atol=1e-4)
    assert document["spread_run"]["silent"][0]["silent"] == 0
