"""Every registered backend keeps the contract of edgekd.backends."""

from __future__ import annotations

import ast
import subprocess
import sys

import numpy as np
import pytest

from edgekd import registry
from edgekd.activations import FORMS
from edgekd.backends import Engine
from edgekd.bench import benchmark
from edgekd.bench.modes.single_stream import SingleStream
from edgekd.device import Device
from edgekd.errors import StageError

STANDS_ALONE = {"numpy", *sys.stdlib_module_names}


@pytest.fixture(params=registry.names("backend"))
def backend(request):
    made = registry.create("backend", request.param)
    if reason := made.available():
        pytest.skip(f"{request.param}: {reason}")
    return made


@pytest.fixture
def runnable(backend):
    if backend.builds_on == "device":
        pytest.skip(f"{backend.name}: its engine is built and run on the device")
    return backend


@pytest.fixture
def engine(runnable, make_onnx, tmp_path):
    out = tmp_path / "engine"
    out.mkdir()
    runnable.compile(make_onnx(), out, threads=1)
    return Engine("tiny", out, runnable.runner, runnable.name)


def load_in_a_fresh_process(engine, batches):
    """Logits of ones by batch size, from a process that sees the runner's file and the engine, not edgekd."""
    code = (
        "import importlib.util, sys, json, numpy as np\n"
        "spec = importlib.util.spec_from_file_location('runner', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "runner = module.load(sys.argv[2])\n"
        "shapes = [runner.run(np.ones((b, 3, 6, 6), np.float32)).shape for b in json.loads(sys.argv[3])]\n"
        "assert 'edgekd' not in sys.modules\n"
        "print(json.dumps([shapes, runner.facts]))"
    )
    argv = [sys.executable, "-c", code, engine.runner, engine.folder, str(batches)]
    return subprocess.run([str(part) for part in argv], capture_output=True, text=True, check=False)


def test_the_registered_name_is_the_class_name(backend):
    assert registry.create("backend", backend.name).__class__ is backend.__class__


def test_forms_exist(backend):
    assert set(backend.forms) == {"any", "continuous"}
    assert set(backend.forms.values()) <= set(FORMS)


def test_the_runner_stands_alone_on_python_3_8(backend):
    tree = ast.parse(backend.runner.read_text(), feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported = {name.partition(".")[0] for name in imported}
    assert imported <= STANDS_ALONE | {backend.name}


@pytest.mark.parametrize("batch", ["batch", 1])
def test_it_compiles_and_runs(runnable, make_onnx, tmp_path, batch):
    out = tmp_path / "engine"
    out.mkdir()
    model = make_onnx(batch=batch)
    assert runnable.check(model) == []
    facts = runnable.compile(model, out, threads=1)
    assert {"runtime", "version", "providers", "threads"} <= set(facts)
    sizes = [1, 3] if batch == "batch" else [1]
    finished = load_in_a_fresh_process(Engine("tiny", out, runnable.runner, runnable.name), sizes)
    assert finished.returncode == 0, finished.stderr
    for size in sizes:
        assert f"[{size}, 5]" in finished.stdout


def test_a_corrupted_model_is_refused(backend, make_onnx, tmp_path):
    model = make_onnx()
    model.write_bytes(model.read_bytes()[:200])
    (problem,) = backend.check(model)
    assert "tiny.onnx is not valid ONNX" in problem
    with pytest.raises(StageError, match=r"tiny\.onnx"):
        backend.compile(model, tmp_path, threads=1)


def test_a_missing_engine_is_refused(engine):
    (engine.folder / "engine.json").unlink()
    finished = load_in_a_fresh_process(engine, [1])
    assert finished.returncode != 0
    assert "engine.json" in finished.stderr


def test_the_agent_runs_it(engine, tmp_path):
    samples = np.random.default_rng(0).standard_normal((20, 3, 6, 6)).astype(np.float32)
    result = benchmark(
        engine,
        engine,
        samples=samples,
        labels=np.zeros(20, np.int64),
        device=Device("local:", tmp_path / "jobs"),
        workdir=tmp_path / "bench",
        mode=SingleStream(seconds=0.1),
        launches=6,
    )
    assert result["accuracy"]["student"] | {"logits_file": ""} == result["accuracy"]["teacher"] | {"logits_file": ""}
    assert result["engines"]["student"]["runtime"] == engine.backend
