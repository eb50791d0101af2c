"""What runs TVM's engines on a device: one file, numpy and two libraries, spoken to in C."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny_model import tiny_onnx

pytest.importorskip("tvm", reason="TVM is an extra: pip install 'edgekd[tvm]'")

from edgekd import registry
from edgekd.backends.tvm import libraries, runner
from edgekd.errors import MissingError

WITHOUT_TVM = """
import importlib.util, sys
importlib.util.find_spec = lambda name: None
sys.path.insert(0, sys.argv[1])
import numpy, runner
print(runner.load(sys.argv[2]).run(numpy.ones((2, 3, 6, 6), numpy.float32)).shape)
assert not {"tvm", "tvm_ffi", "torch"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    backend = registry.create("backend", "tvm")
    backend.compile(tiny_onnx(folder.parent / "tiny.onnx"), folder, threads=1)
    return folder


def run_without_tvm(folder, engine):
    shutil.copy(runner.__file__, folder)
    argv = [sys.executable, "-c", WITHOUT_TVM, str(folder), str(engine)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)


def test_it_needs_no_package_of_tvms(engine, tmp_path):
    for library in registry.create("backend", "tvm").libraries():
        shutil.copy(library, tmp_path)
    done = run_without_tvm(tmp_path, engine)
    assert (done.stdout.strip(), done.stderr) == ("(2, 5)", "")


def test_without_the_libraries_it_says_where_they_belong(engine, tmp_path):
    done = run_without_tvm(tmp_path, engine)
    what = f"there is no libtvm_ffi.so in {engine}, {tmp_path}: put it there, or pip install apache-tvm"
    assert done.stderr.strip().endswith(what)


def test_logits_are_a_copy_and_shapes_may_change(engine):
    opened = runner.load(str(engine))
    x = np.random.default_rng(0).standard_normal((3, 3, 6, 6)).astype(np.float32)
    first = opened.run(x[:1])
    kept = first.copy()
    np.testing.assert_array_equal(opened.run(x)[0], kept[0])
    np.testing.assert_array_equal(opened.run(x[1:2])[0], opened.run(x)[1])
    np.testing.assert_array_equal(first, kept)


def test_what_the_runtime_complains_of_is_said(engine):
    with pytest.raises(runner.EngineError, match=r"RuntimeError: Check failed: .*8 vs\. 6"):
        runner.load(str(engine)).run(np.ones((1, 3, 8, 8), np.float32))


def test_after_a_shape_that_fails_it_goes_on(engine):
    opened, x = runner.load(str(engine)), np.ones((1, 3, 6, 6), np.float32)
    expected = opened.run(x)
    with pytest.raises(runner.EngineError):
        opened.run(np.ones((1, 3, 8, 8), np.float32))
    assert opened._feed is None
    np.testing.assert_array_equal(opened.run(x), expected)


def test_inferences_leave_no_memory_behind(engine):
    opened, x = runner.load(str(engine)), np.ones((64, 3, 6, 6), np.float32)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    for number in range(4000):
        opened.run(x[: 1 + number % 2])
        if number == 1000:
            before = resident()
    assert resident() - before < 256  # pages: one leaked tensor of logits per inference would be over a thousand


def test_libraries_that_cannot_be_fetched_are_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.0.1")
    with pytest.raises(MissingError) as caught:
        libraries.libraries("aarch64")
    error = caught.value
    assert error.what == "apache-tvm-ffi==0.0.1 and apache-tvm==0.0.1 for aarch64 could not be fetched"
    assert "No matching distribution found for apache-tvm-ffi==0.0.1" in error.allowed
    assert error.fix.endswith(
        f"or put libtvm_ffi.so and libtvm_runtime.so into {tmp_path}/edgekd/tvm/aarch64-0.0.1-0.0.1"
    )


def test_libraries_that_are_there_are_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.metadata.version", lambda package: "1")
    monkeypatch.setattr(subprocess, "run", None)
    (tmp_path / "edgekd/tvm/aarch64-1-1").mkdir(parents=True)
    for name in ("libtvm_ffi.so", "libtvm_runtime.so"):
        (tmp_path / "edgekd/tvm/aarch64-1-1" / name).touch()
    assert [file.name for file in libraries.libraries("aarch64")] == ["libtvm_ffi.so", "libtvm_runtime.so"]
    (tmp_path / "edgekd/tvm/aarch64-1-1/libtvm_runtime_cuda.so").touch()
    assert libraries.libraries("aarch64", gpu=True)[2].name == "libtvm_runtime_cuda.so"
