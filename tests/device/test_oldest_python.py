"""The oldest Python that a board may have, a real one: what is sent there must run under 3.8."""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest
import tensorrt_stand_in
from test_interruptions import jobs, measure
from tiny_model import tiny_onnx

from edgekd import backends, registry
from edgekd.backends import Engine
from edgekd.bench import benchmark
from edgekd.bench.modes.single_stream import SingleStream
from edgekd.device import Device
from edgekd.stages import ENGINE
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification


@pytest.fixture
def url(sshd, python_3_8):
    return sshd.url(python=str(python_3_8))


def test_a_benchmark(url, sshd, tmp_path):
    result = measure(url, tmp_path / "host")
    assert result["device"]["python"].startswith("3.8.")
    assert result["speedup"]["value"] == pytest.approx(3.0, rel=0.35)
    assert jobs(sshd) == []


def test_turns(url, tmp_path):
    first, second = Device(url, tmp_path), Device(url, tmp_path)
    with first.reserved(pytest.fail):
        assert second.transport.holder()["user"]
    assert second.transport.holder() == {}


def test_onnx_runtimes_last_release_for_it_answers_as_ours(url, tmp_path):
    backend, engines = registry.create("backend", "onnxruntime"), []
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        backend.compile(tiny_onnx(tmp_path / f"{name}.onnx"), tmp_path / name, threads=1)
        engines.append(Engine(name, tmp_path / name, backend.runner, backend.name))
    here = backends.load_runner(engines[0]).run
    samples = np.random.default_rng(0).standard_normal((8, 3, 6, 6)).astype(np.float32)
    logits = np.concatenate([here(x[None]) for x in samples])
    judge = Judge(Classification(), logits.argmax(1), logits.shape[1:])
    result = benchmark(
        *engines, samples=samples, judge=judge, device=Device(url, tmp_path), workdir=tmp_path / "work",
        mode=SingleStream(seconds=0.2), launches=6,
    )  # fmt: skip
    there = np.load(tmp_path / "work/student_logits.npy")
    np.testing.assert_allclose(there, logits, rtol=1e-4, atol=1e-5)
    assert result["accuracy"]["student"]["score"] == 1.0
    assert result["engines"]["student"]["version"] != ""


@pytest.mark.skipif(bool(tensorrt_stand_in.missing()), reason=tensorrt_stand_in.missing())
def test_a_build_by_trtexec(python_3_8, tmp_path):
    """As on a Jetson with JetPack 5, whose Python is 3.8; by a stand-in for trtexec."""
    board = tensorrt_stand_in.Board(tmp_path / "board", module=False)
    folder = tensorrt_stand_in.bundle(tmp_path / "bundle").file(ENGINE)
    env = os.environ | {"PATH": f"{board.folder}:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(board.folder)}
    done = subprocess.run([python_3_8, "-m", "on_device", "."], cwd=folder, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads((folder / "build.json").read_text())["module"] == "trtexec"
