"""Every registered backend keeps the contract of edgekd.backends."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import tensorrt_stand_in
import torch

from edgekd import registry
from edgekd.activations import FORMS
from edgekd.backends import Engine
from edgekd.bench import benchmark
from edgekd.bench.modes.single_stream import SingleStream
from edgekd.data import Shape
from edgekd.device import Device
from edgekd.errors import StageError
from edgekd.export import export
from edgekd.networks import build
from edgekd.quantize import dialects, half, ptq
from edgekd.recipe import Choice
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification

STANDS_ALONE = {"numpy", *sys.stdlib_module_names}
PRECISIONS = ("fp32", "fp16", "int8")


@pytest.fixture(params=registry.names("backend"))
def backend(request):
    made = registry.create("backend", request.param)
    if reason := made.available():
        pytest.skip(f"{request.param}: {reason}")
    return made


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    return tensorrt_stand_in.Board(tmp_path_factory.mktemp("stand-in") / "board")


@pytest.fixture
def python(backend, request):
    """The interpreter of a machine that its engines run on: this one, or a stand-in for the board that builds them."""
    if backend.builds_on == "host":
        return sys.executable
    reason = tensorrt_stand_in.missing() if backend.name == "tensorrt" else "no stand-in for its board"
    if reason:
        pytest.skip(f"{backend.name}: {reason}")
    return request.getfixturevalue("board").python


@pytest.fixture
def engine(backend, make_onnx, tmp_path):
    return compiled(backend, make_onnx(), tmp_path / "engine")


def compiled(backend, model, out):
    out.mkdir()
    backend.compile(model, out, threads=1)
    return Engine(model.stem, out, backend.runner, backend.name)


ASKING = """
import importlib.util, json, sys, numpy as np
spec = importlib.util.spec_from_file_location("runner", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
runner = module.load(sys.argv[2])
given = np.load(sys.argv[3])
np.savez(sys.argv[4], **{name: runner.run(given[name]) for name in given})
assert "edgekd" not in sys.modules
print(json.dumps(runner.facts))
"""


def asked(engine, python, batches, folder):
    """How a fresh process ends that sees the runner's file and the engine, not edgekd; and the answers to batches."""
    given, answers = folder / "given.npz", folder / "answers.npz"
    np.savez(given, **{str(at): batch for at, batch in enumerate(batches)})
    answers.unlink(missing_ok=True)
    argv = [python, "-c", ASKING, engine.runner, engine.folder, given, answers]
    finished = subprocess.run([str(part) for part in argv], capture_output=True, text=True, check=False)
    found = np.load(answers) if finished.returncode == 0 else {}
    return finished, [found[str(at)] for at in range(len(batches) if found else 0)]


def ones(*batches, size=6):
    return [np.ones((batch, 3, size, size), np.float32) for batch in batches]


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


def test_a_corrupted_model_is_refused(backend, make_onnx, tmp_path):
    model = make_onnx()
    model.write_bytes(model.read_bytes()[:200])
    (problem,) = backend.check(model)
    assert "tiny.onnx is not valid ONNX" in problem
    with pytest.raises(StageError, match=r"tiny\.onnx"):
        backend.compile(model, tmp_path, threads=1)


MODELS = {"grey": (1, 8, 8), "color": (3, 12, 10)}
BATCHES = {"batch 1": False, "dynamic": True}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """resnet(image, dynamic, form): a ResNet-8 with LMA by precision, as ONNX; and images for it."""
    made = {}

    def models(image, dynamic, form):
        if (image, dynamic, form) not in made:
            made[image, dynamic, form] = _resnet(tmp_path_factory.mktemp("resnet"), MODELS[image], dynamic, form)
        return made[image, dynamic, form]

    return models


def _resnet(folder, shape, dynamic, form):
    images = np.random.default_rng(0).standard_normal((32, *shape)).astype(np.float32)
    choice = Choice("lma", {"k": 4, "continuous": True})
    network = build("resnet", {"depth": 8, "width": 0.25}, Shape(*shape), 5, choice, seed=0)
    with torch.no_grad():
        network(torch.from_numpy(images))
    files = {precision: folder / f"{precision}.onnx" for precision in PRECISIONS}
    export(network.eval(), files["fp32"], example=images[:1], opset=18, dynamic_batch=dynamic, form=form, metadata={})
    half.quantize(files["fp32"], files["fp16"], images)
    onnx.save(ptq.prepare(files["fp32"], images).quantized("minmax", 100), files["int8"])
    return files, images


# The difference to ONNX Runtime computing node by node, root mean square, in units of the logits'. In INT8 a sum that
# is rounded otherwise moves a code by one, here and there; fp16 has 11 bits, and may be computed in more.
TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "int8": 0.05}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("image", MODELS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_computes_what_the_model_says(backend, python, resnet, precision, image, batch, tmp_path):
    files, images = resnet(image, BATCHES[batch], backend.forms["continuous"])
    model = onnx.load(files[precision])
    onnx.save(dialects.translated(model, backend.dialect), tmp_path / "model.onnx")
    if precision not in backend.precisions:
        pytest.skip(f"{backend.name} computes no {precision}, and says so: edgekd refuses such a recipe")
    engine = compiled(backend, tmp_path / "model.onnx", tmp_path / "engine")
    batches = [images[:1], images[1:4], images[4:]] if BATCHES[batch] else [images[:1], images[1:2]]
    finished, answers = asked(engine, python, batches, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert {"runtime", "version", "providers", "threads"} <= json.loads(finished.stdout.splitlines()[-1]).keys()
    # What runs nothing says so in its facts, and answers zeros.
    expected = [as_written(model, x) * (backend.name != "null") for x in batches]
    for got, wanted in zip(answers, expected, strict=True):
        assert got.shape == wanted.shape and got.dtype == np.float32
        assert np.sqrt(np.mean((got - wanted) ** 2)) <= TOLERANCE[precision] * np.sqrt(np.mean(wanted**2))


def as_written(model, x):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def test_a_truncated_engine_is_refused(engine, python, tmp_path):
    for file in sorted(file for file in engine.folder.iterdir() if file.is_file()):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        finished, _ = asked(engine, python, ones(1), tmp_path)
        assert finished.returncode == 1 and "Error" in finished.stderr, file.name
        file.write_bytes(content)


def test_a_missing_engine_is_refused(engine, python, tmp_path):
    (engine.folder / "engine.json").unlink()
    finished, _ = asked(engine, python, ones(1), tmp_path)
    assert finished.returncode != 0
    assert "engine.json" in finished.stderr


# What an engine's settings ask for that the machine which it gets to has not got.
ELSEWHERE = {
    "onnxruntime": {"providers": ["QNNExecutionProvider"]},
    "openvino": {"device": "NPU"},
    "tensorrt": {"version": "99.0"},
    "tvm": {"arch": "riscv64"},
}


def test_an_engine_for_another_target_is_refused(engine, python, tmp_path):
    if engine.backend not in ELSEWHERE:
        pytest.skip(f"{engine.backend}: its engines are for any machine")
    file, asked_for = engine.folder / "engine.json", ELSEWHERE[engine.backend]
    file.write_text(json.dumps({**json.loads(file.read_text()), **asked_for}))
    finished, _ = asked(engine, python, ones(1), tmp_path)
    (what,) = asked_for.values()
    assert finished.returncode == 1 and "Error: " in finished.stderr
    assert (what if isinstance(what, str) else what[0]) in finished.stderr.splitlines()[-1]


def test_images_of_another_size_are_refused(engine, python, tmp_path):
    finished, _ = asked(engine, python, ones(1, size=5), tmp_path)
    assert finished.returncode == 1 and "Traceback" in finished.stderr  # no answer, and no crash


def test_the_agent_runs_it(engine, python, tmp_path):
    samples = np.random.default_rng(0).standard_normal((20, 3, 6, 6)).astype(np.float32)
    result = benchmark(
        engine,
        engine,
        samples=samples,
        judge=Judge(Classification(), np.zeros(20, np.int64), (5,)),
        device=Device(f"local:?python={python}", tmp_path / "jobs"),
        workdir=tmp_path / "bench",
        mode=SingleStream(seconds=0.1),
        launches=6,
    )
    assert result["accuracy"]["student"] | {"logits_file": ""} == result["accuracy"]["teacher"] | {"logits_file": ""}
    assert result["engines"]["student"]["runtime"] == engine.backend
