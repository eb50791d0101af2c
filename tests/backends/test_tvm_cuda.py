"""TVM for NVIDIA GPUs: engines compiled without one, and their CUDA source computing on a stand-in for one."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_stand_in
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from tiny_model import tiny_onnx
from tvm_models import CONVOLUTIONS, joined_model, operators_model, stack

pytest.importorskip("tvm", reason="TVM is an extra: pip install 'edgekd[tvm]'")

from edgekd import registry
from edgekd.backends import Engine
from edgekd.backends.tvm import child, libraries, runner
from edgekd.bench import benchmark
from edgekd.bench.modes.single_stream import SingleStream
from edgekd.device import Device
from edgekd.errors import MissingError, RecipeError, StageError
from edgekd.quantize import ptq
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which TVM links engines with")
CROSS = {"arch": "aarch64", "cpu": "cortex-a78ae"} if shutil.which("aarch64-linux-gnu-g++") else {}
RUN = """
import ctypes, json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import runner
runner._TIMED = 1
opened, gpu = runner.load(sys.argv[2]), ctypes.CDLL(runner.CUDART)
images = np.load(sys.argv[3])
opened.run(images[:1])  # the first one times its parts
launches, waits, answers = gpu.launches(), gpu.waits(), opened.run(images[:1])
counted = [gpu.launches() - launches, gpu.waits() - waits]
if len(sys.argv) > 4:
    answers = np.concatenate([answers, opened.run(images[1:])])
np.save(sys.argv[3], answers)
print(json.dumps([*counted, opened.facts]))
"""


def create(gpu="sm_87", **options):
    return registry.create("backend", "tvm", options={"gpu": gpu, **options})


@pytest.fixture
def no_nvcc(tmp_path, monkeypatch):
    """A folder whose nvcc stands in for the real one."""
    (tmp_path / "nvcc").mkdir()
    folder = cuda_stand_in.nvcc(tmp_path / "nvcc")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def run_on_stand_in(engine, stand_in, *arguments):
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stand_in)}
    argv = [sys.executable, "-c", RUN, os.path.dirname(runner.__file__), str(engine), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=250, check=False)


def answers_of(model, nvcc_folder, shape, batch=1):
    """Logits by the kernels of the model's engine, those of ONNX Runtime, what compile said, and the runner's facts."""
    folder = model.parent
    (folder / "engine").mkdir()
    facts = create().compile(model, folder / "engine", threads=1)
    stand_in = cuda_stand_in.make(nvcc_folder, (nvcc_folder / cuda_stand_in.SOURCE).read_text())
    x = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
    np.save(folder / "images.npy", x)
    done = run_on_stand_in(folder / "engine", stand_in, folder / "images.npy", *["any batch"] * (batch > 1))
    assert done.returncode == 0, done.stderr
    launches, waits, seen = json.loads(done.stdout)
    assert (launches, waits) == (facts["kernels"], 1) and facts["unscheduled"] == []
    session = onnxruntime.InferenceSession(str(model))
    (expected,) = session.run(None, {session.get_inputs()[0].name: x})
    return np.load(folder / "images.npy"), expected, facts, seen


def test_lma_with_jumps_is_part_of_the_convolutions_kernel(tmp_path, no_nvcc):
    model = stack(tmp_path / "lma.onnx", "lma", "function", k=8)
    got, expected, facts, seen = answers_of(model, no_nvcc, (3, 8, 8))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)
    assert facts["lma"] == [{"segments": 8, "form": "select", "over_relu": None}]
    relu = create().compile(stack(tmp_path / "relu.onnx", "relu"), tmp_path, threads=1)
    assert facts["kernels"] == relu["kernels"]
    assert facts["providers"] == seen["providers"] == ["sm_87"] and seen["device"] == cuda_stand_in.NAME
    assert list(seen["parts_ms"]) == ["copy_in", "compute", "copy_out"] and min(seen["parts_ms"].values()) > 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc, which is CUDA's compiler")
def test_a_jetsons_engine_holds_machine_code_and_no_source(tmp_path):
    model = stack(tmp_path / "lma.onnx", "lma", "function", k=8)
    create(**CROSS).compile(model, tmp_path, threads=1)
    content, settings = (tmp_path / "model.so").read_bytes(), json.loads((tmp_path / "engine.json").read_text())
    assert cuda_stand_in.FATBIN in content and b"sm_87" in content
    assert b"__global__" not in content and b"sm_75" not in content
    machines = {"x86_64": 62, "aarch64": 183}
    assert int.from_bytes(content[18:20], "little") == machines[settings["arch"]]
    assert settings["arch"] == CROSS.get("arch", platform.machine()) and settings["gpu"] == "sm_87"


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda path: joined_model(path, (12, 9, 14), CONVOLUTIONS), (12, 9, 14)),
        (lambda path: operators_model(path, (6, 8, 10)), (6, 8, 10)),
    ],
    ids=["convolutions", "operators"],
)
def test_kernels_for_any_batch_agree_with_onnxruntime(tmp_path, no_nvcc, make, shape):
    got, expected, _, _ = answers_of(make(tmp_path / "model.onnx"), no_nvcc, shape, batch=3)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


def test_int8_models_are_computed_in_float(tmp_path, no_nvcc):
    path = stack(tmp_path / "model.onnx", "lma", "function", k=8)
    images = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    model = ptq.prepare(path, images).quantized("minmax", 100)
    onnx.save(model, path)
    got, expected, facts, _ = answers_of(path, no_nvcc, (3, 8, 8))
    assert facts["int8_kernels"] == 0
    constants = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    scales = [constants[node.input[1]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert np.abs(got - expected).max() <= max(float(scale) for scale in scales if scale.ndim == 0)


def an_engine(folder, gpu):
    """Settings alone: the GPU is looked at before anything is loaded."""
    settings = {"arch": platform.machine(), "cpu": "", "needs": [], "gpu": gpu, "threads": 1}
    (folder / "engine.json").write_text(json.dumps(settings))
    return folder


def test_without_a_driver_an_engine_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "DRIVER", "libno-such-driver.so")
    with pytest.raises(runner.EngineError) as caught:
        runner.load(str(an_engine(tmp_path, "sm_87")))
    assert str(caught.value).startswith(
        "this engine is for an NVIDIA GPU, sm_87, and there is no NVIDIA driver here (libno-such-driver.so: "
    )


@pytest.fixture
def unasked():
    """The driver is asked once in a process: here, anew for every test."""
    child.has_gpu.cache_clear()
    yield
    child.has_gpu.cache_clear()


@pytest.mark.parametrize(("gpu", "fits"), [("sm_87", False), ("sm_90", True)])
def test_the_driver_is_asked_in_a_process_of_its_own(tmp_path, monkeypatch, unasked, gpu, fits):
    stand_in = cuda_stand_in.make(tmp_path, capability=(9, 0))
    (tmp_path / "numpy.py").write_text("raise ImportError('of the folder that edgekd happens to be called in')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(stand_in))
    assert create(gpu).runs_here == fits
    assert str(stand_in) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("driver", ["os.abort()", "time.sleep(60)"])
def test_a_driver_that_crashes_or_hangs_has_no_gpu(monkeypatch, unasked, driver):
    monkeypatch.setattr(child, "DRIVER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(child, "ASK_DRIVER", f"import os, time; {driver}")
    assert not create().runs_here


def test_a_benchmark_without_the_gpu_says_what_to_do(tmp_path):
    (tmp_path / "engine").mkdir()
    engine = Engine("student", an_engine(tmp_path / "engine", "sm_35"), create().runner, "tvm")
    samples = np.zeros((4, 3, 6, 6), np.float32)
    with pytest.raises(StageError) as caught:
        benchmark(
            engine, engine, samples=samples, judge=Judge(Classification(), np.zeros(4, np.int64), (5,)), launches=6,
            device=Device("local:", tmp_path / "jobs"), workdir=tmp_path / "bench", mode=SingleStream(seconds=0.1),
        )  # fmt: skip
    error = caught.value
    assert error.what.startswith('benchmark on "local:": ') and "EngineError: this engine is for " in error.what
    assert error.allowed == "an engine runs on the kind of processor, or of GPU, that it is compiled for"
    assert error.fix.startswith("compile it for that machine: another --target, or other options of the backend")


def test_an_engine_for_another_gpu_is_refused(tmp_path):
    stand_in = cuda_stand_in.make(tmp_path, capability=(9, 0))
    done = run_on_stand_in(an_engine(tmp_path, "sm_87"), stand_in)
    assert done.stderr.strip().splitlines()[-1] == (
        "runner.EngineError: this engine is for sm_87, and the GPU here is sm_90 (Stand-in): compile it for that"
    )


def test_without_cudas_runtime_it_is_named(monkeypatch):
    monkeypatch.setattr(runner, "CUDART", "libno-such-cudart.so.13")
    with pytest.raises(runner.EngineError, match=r"there is no libno-such-cudart\.so\.13 here"):
        runner._Gpu()


def test_the_libraries_are_those_of_a_gpu(tmp_path):
    *plain, cuda = libraries.libraries("", gpu=True)
    assert plain == libraries.libraries("") and cuda.name == "libtvm_runtime_cuda.so"
    assert all(name.encode() + b"\0" in cuda.read_bytes() for name in (runner.DRIVER, runner.CUDART))


@pytest.mark.parametrize(("tools", "lacking"), [({}, "nvcc and g++ and nm"), ({"g++": 1, "nm": 1}, "nvcc")])
def test_without_nvcc_its_installation_is_explained(monkeypatch, tmp_path, tools, lacking):
    monkeypatch.setattr("shutil.which", tools.get)
    with pytest.raises(MissingError) as caught:
        create().compile(tiny_onnx(tmp_path / "tiny.onnx"), tmp_path, threads=1)
    assert str(caught.value).splitlines() == [
        f'error: backend "tvm" cannot be used here: {lacking} not installed',
        "       what can be used: edgekd doctor",
        "fix:   install CUDA's compiler, https://developer.nvidia.com/cuda-downloads, and put its bin folder into PATH",
    ]


def test_a_gpu_that_nvcc_does_not_know_is_refused(tmp_path, no_nvcc):
    (problem,) = create("sm_53").check(tiny_onnx(tmp_path / "tiny.onnx"))
    assert problem == ("tvm cannot compile tiny.onnx: sm_53 is no GPU that the nvcc here compiles for: sm_75, sm_87")


@pytest.mark.parametrize("options", [{"tuning": "quick"}, {"tracker": "localhost:9190/orin"}])
def test_tuning_for_a_gpu_is_refused(options):
    with pytest.raises(RecipeError) as caught:
        create(**options)
    assert str(caught.value).splitlines() == [
        "error: backend tvm: gpu = sm_87 cannot be tuned",
        "       expected: tuning = none, and no tracker; only a CPU's loops are searched for",
        "fix:   leave out tuning and tracker, or gpu",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc, which is CUDA's compiler")
def test_on_a_gpu_logits_equal_those_of_onnxruntime(tmp_path):
    try:
        gpu, _ = runner.gpu_here()
    except runner.EngineError as reason:
        pytest.skip(str(reason))
    model = stack(tmp_path / "lma.onnx", "lma", "function", k=8)
    backend = create(gpu)
    assert backend.runs_here
    backend.compile(model, tmp_path, threads=1)
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(str(model)).run(None, {"images": x})
    np.testing.assert_allclose(runner.load(str(tmp_path)).run(x), expected, rtol=1e-4, atol=2e-5)
