"""Every registered backend keeps the contract of edgekd.backends."""

from __future__ import annotations

import ast
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgekd import registry
from edgekd.activations import FORMS
from edgekd.backends import Engine, load_runner
from edgekd.bench import benchmark
from edgekd.bench.modes.single_stream import SingleStream
from edgekd.data import Shape
from edgekd.device import Device
from edgekd.errors import StageError
from edgekd.export import export
from edgekd.networks import build
from edgekd.quantize import dialects, ptq
from edgekd.recipe import Choice
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification

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


MODELS = {"grey": (1, 8, 8), "color": (3, 12, 10)}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def resnet(request, tmp_path_factory):
    """The shape of a ResNet-8's images, and the network in fp32 and INT8 as ONNX, by a form of its LMA layers."""
    shape, folder = request.param, tmp_path_factory.mktemp("resnet")
    images = np.random.default_rng(0).standard_normal((32, *shape)).astype(np.float32)
    choice = Choice("lma", {"k": 4, "continuous": True})
    network = build("resnet", {"depth": 8, "width": 0.25}, Shape(*shape), 5, choice, seed=0)
    with torch.no_grad():
        network(torch.from_numpy(images))
    made = {}

    def models(form):
        if form not in made:
            file = folder / f"{form}.onnx"
            export(network.eval(), file, example=images[:1], opset=18, dynamic_batch=True, form=form, metadata={})
            made[form] = {"fp32": onnx.load(file), "int8": ptq.prepare(file, images).quantized("minmax", 100)}
        return made[form]

    return shape, models


# The difference to ONNX Runtime computing node by node, root mean square, in units of the logits'. In INT8 a sum that
# is rounded otherwise moves a code by one, here and there.
TOLERANCE = {"fp32": 1e-5, "int8": 0.05}


@pytest.mark.parametrize("precision", TOLERANCE)
def test_logits_equal_those_of_onnxruntime(runnable, resnet, precision, tmp_path):
    if runnable.name == "null" or precision not in runnable.precisions:
        pytest.skip(f"{runnable.name} computes no {precision}, and says so")
    shape, models = resnet
    model = models(runnable.forms["continuous"])[precision]
    onnx.save(dialects.translated(model, runnable.dialect) if precision == "int8" else model, tmp_path / "model.onnx")
    (tmp_path / "engine").mkdir()
    runnable.compile(tmp_path / "model.onnx", tmp_path / "engine", threads=1)
    runner = load_runner(Engine("model", tmp_path / "engine", runnable.runner, runnable.name))
    x = np.random.default_rng(1).standard_normal((64, *shape)).astype(np.float32)
    expected = as_written(model, x)
    got = np.concatenate([runner.run(x[:1]), runner.run(x[1:4]), runner.run(x[4:])])
    assert np.sqrt(np.mean((got - expected) ** 2)) <= TOLERANCE[precision] * np.sqrt(np.mean(expected**2))


def as_written(model, x):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def test_a_truncated_engine_is_refused(engine):
    for file in sorted(file for file in engine.folder.iterdir() if file.is_file()):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        finished = load_in_a_fresh_process(engine, [1])
        assert finished.returncode == 1 and "Error" in finished.stderr, file.name
        file.write_bytes(content)


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
        judge=Judge(Classification(), np.zeros(20, np.int64), (5,)),
        device=Device("local:", tmp_path / "jobs"),
        workdir=tmp_path / "bench",
        mode=SingleStream(seconds=0.1),
        launches=6,
    )
    assert result["accuracy"]["student"] | {"logits_file": ""} == result["accuracy"]["teacher"] | {"logits_file": ""}
    assert result["engines"]["student"]["runtime"] == engine.backend
