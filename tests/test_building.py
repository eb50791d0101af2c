"""Engines that are built on the device: over `local:`, with stand-ins for TensorRT and CUDA."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tensorrt_stand_in
from tiny_job import make_job
from tiny_model import tiny_onnx

from edgekd import building, compiling, pipeline, stages
from edgekd.backends.tensorrt import TensorRT, built
from edgekd.device import Finished
from edgekd.errors import StageError

SUBJECTS = ("student", "teacher")
pytestmark = pytest.mark.skipif(bool(tensorrt_stand_in.missing()), reason=tensorrt_stand_in.missing())


@pytest.fixture
def board(tmp_path):
    return tensorrt_stand_in.Board(tmp_path / "board")


@pytest.fixture
def build(board, tmp_path):
    """build(options of the backend): what the stage makes on the board, its folder among it."""
    bundle = tensorrt_stand_in.bundle(tmp_path / "bundle")
    job = make_job(tmp_path / "store", target="jetson")
    job.device = f"local:?python={board.python}"
    counted = iter(range(100))

    def run(bundle=bundle):
        out, work = (tmp_path / f"{name}-{next(counted)}" for name in ("out", "work"))
        out.mkdir()
        work.mkdir()
        result = stages.build("student", job, {"engine-student": bundle}, out, work)
        return SimpleNamespace(**result, folder=out / stages.ENGINE, log=out / "log" / "tensorrt.log")

    return run


def test_an_engine_is_built_there_and_fetched_with_all_that_the_build_says(build):
    made = build()
    assert (made.evidence, made.version, made.mode, made.reused) == (
        "built_on_device", "10.3.0", "strongly typed", False,
    )  # fmt: skip
    assert made.identity["device"] == "Stand-in" and made.identity["multiprocessors"] == 8
    assert made.size_bytes == (made.folder / "model.plan").stat().st_size
    assert [(row["layer"], row["asked"], row["ran"]) for row in made.layers] == [
        ("kernel", "fp32", "fp32"), ("matrix", "fp32", "fp32"),
    ]  # fmt: skip
    assert made.alarms == [] and made.kernels == 2
    assert made.log.is_file()


def test_what_fits_is_kept_and_sent_instead_of_built_again(build, board):
    first, second = build(), build()
    assert (first.reused, second.reused) == (False, True)
    assert (second.folder / "model.plan").read_bytes() == (first.folder / "model.plan").read_bytes()


def test_another_tensorrt_builds_its_own_engine(build, board):
    build()
    module = board.folder / "tensorrt.py"
    module.write_text(module.read_text().replace('"10.3.0"', '"10.4.0"'))
    second = build()
    assert not second.reused and second.version == "10.4.0"
    assert (second.folder / "timing.cache").read_bytes() == b"timed"  # that of 10.3 is not for it


def test_timings_are_kept_between_builds_on_the_same_board(build, tmp_path):
    build()
    another = build(tensorrt_stand_in.bundle(tmp_path / "another", optimization_level=5))
    assert not another.reused
    assert (another.folder / "timing.cache").read_bytes() == b"timedtimed"


def test_an_engine_that_was_truncated_where_it_is_kept_is_built_again(build, tmp_path):
    build()
    (kept,) = (tmp_path / "store").glob("cache/engines/*/model.plan")
    kept.write_bytes(kept.read_bytes()[:100])
    assert not build().reused
    assert build().reused


@pytest.mark.parametrize(
    ("fault", "what", "fix"),
    [
        ("memory", "Cuda Runtime (out of memory)", "limit what kernels may take: the backend's option workspace_mib"),
        ("killed", "its build was killed (signal 9), as happens when memory runs out", "option workspace_mib"),
        ("no gpu", "TensorRT finds no GPU that it can use", "see: edgekd check MODEL.onnx"),
    ],
)
def test_what_goes_wrong_there_is_said_in_the_boards_words(build, board, tmp_path, fault, what, fix):
    board.fails_by(fault)
    with pytest.raises(StageError) as caught:
        build()
    assert caught.value.what == f'no engine of the student on "local:?python={board.python}": {what}'
    assert fix in caught.value.fix
    log = next(tmp_path.glob("work-*/tensorrt.log"))
    assert caught.value.allowed.endswith(f"all of it: {log}")
    assert not list((tmp_path / "store" / "work").glob("local/jobs/*"))
    board.fails_by("")
    assert build().evidence == "built_on_device"


def test_a_command_about_a_board_can_be_pasted_into_a_shell():
    missing = Finished(
        1, "", ("neither the Python module tensorrt nor trtexec is here: No module named 'tensorrt'",), 1.0
    )
    error = building._failed(missing, "the student", "ssh://board?config=c&python=p", None)
    assert error.fix == "install what is missing there, see: edgekd doctor --device 'ssh://board?config=c&python=p'"


def test_a_board_with_an_older_tensorrt_is_the_wrong_target(build, tmp_path):
    with pytest.raises(StageError) as caught:
        build(tensorrt_stand_in.bundle(tmp_path / "newer", version="10.15.1"))
    assert caught.value.what.endswith(
        "the model was prepared for TensorRT 10.15.1, and here is 10.3.0: choose another target, or name this version"
        ' in one of your own: backends: [tensorrt: {version: "10.3"}]'
    )
    assert caught.value.fix == "edgekd list targets"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda built: built["identity"].update(device="Orin"), "belongs to another board, model or TensorRT"),
        (
            lambda built: built["files"].update({"model.plan": ["0" * 64, 1]}),
            "model.plan from .* is damaged: its sha256",
        ),
        (lambda built: built.update(seconds="long"), 'build.json: not what the agent writes: seconds = "long"'),
        (lambda built: built["files"].update({"../../escape": ["0" * 64, 1]}), ""),
    ],
)
def test_what_comes_back_is_looked_at(build, board, change, what, monkeypatch):
    from edgekd.device.local import Local

    get = Local.get

    def tampered(self, folder, name, target, limit_bytes):
        get(self, folder, name, target, limit_bytes)
        if name == "build.json":
            content = json.loads(target.read_text())
            change(content)
            target.write_text(json.dumps(content))

    monkeypatch.setattr(Local, "get", tampered)
    if what:
        with pytest.raises(StageError, match=what):
            build()
    else:
        assert "escape" not in str(list(build().folder.rglob("*")))


@pytest.mark.parametrize(
    ("release", "mode", "network", "flags"),
    [
        ("8.6.2", "flags", ["EXPLICIT_BATCH"], ["INT8", "FP16"]),
        ("10.3.0", "strongly typed", ["EXPLICIT_BATCH", "STRONGLY_TYPED"], []),
        ("11.4.1", "types of the graph", [], []),
    ],
)
def test_each_release_is_asked_for_int8_in_its_own_way(tmp_path, release, mode, network, flags):
    board = tensorrt_stand_in.Board(tmp_path / "board", release=release)
    job = make_job(tmp_path / "store", target="jetson")
    job.device = f"local:?python={board.python}"
    for folder in ("out", "work"):
        (tmp_path / folder).mkdir()
    bundle = tensorrt_stand_in.bundle(tmp_path / "bundle", int8=True, version=release)
    made = stages.build("student", job, {"engine-student": bundle}, tmp_path / "out", tmp_path / "work")
    assert (made["version"], made["mode"], made["tried"]) == (release, mode, [])
    assert {row["ran"] for row in made["layers"] if row["asked"] == "int8"} == {"int8"}
    head = json.loads((tmp_path / "out" / stages.ENGINE / "model.plan").read_bytes().partition(b"\n")[0])
    assert (head["network"], head["flags"]) == (network, flags)


def test_trtexec_builds_and_times_where_the_module_is_not(tmp_path):
    board = tensorrt_stand_in.Board(tmp_path / "board", module=False)
    job = make_job(tmp_path / "store", target="jetson")
    job.device = f"local:?python={board.python}"
    for folder in ("out", "work"):
        (tmp_path / folder).mkdir()
    bundle = tensorrt_stand_in.bundle(tmp_path / "bundle")
    made = stages.build("student", job, {"engine-student": bundle}, tmp_path / "out", tmp_path / "work")
    assert (made["module"], made["version"], made["mode"]) == ("trtexec", "10.3.0", "trtexec")
    assert made["timed"]["kernels_alone"]["latency"]["median"] == 0.8
    assert made["argv"][0][1:3] == ["--onnx=model.onnx", "--saveEngine=model.plan"]
    assert made["identity"]["compute_capability"] == "8.7"
    with pytest.raises(StageError) as caught:
        stages.bench(job, {f"build-{name}": SimpleNamespace(result=made) for name in SUBJECTS}, tmp_path, tmp_path)
    assert str(caught.value).splitlines() == [
        f'error: the engines on "{job.device}" can be run by trtexec alone, which built them',
        "       what trtexec 10.3.0 timed: student 0.8 ms, teacher 0.8 ms",
        "fix:   see edgekd report; from TensorRT 8.5 on, with its Python module: sudo apt install python3-libnvinfer",
    ]
    board.fails_by("memory")
    with pytest.raises(StageError, match=r"trtexec failed: Error\[2\]: out of memory"):
        other = tensorrt_stand_in.bundle(tmp_path / "other", optimization_level=1)
        (tmp_path / "out-2").mkdir()
        stages.build("student", job, {"engine-student": other}, tmp_path / "out-2", tmp_path / "work")


# ---------------------------------------------------------------- before the board is reached


def examined(tmp_path, **model):
    (tmp_path / "8.6.yaml").write_text('name: older\nbackends: [tensorrt: {version: "8.6.2"}]\n')
    job = make_job(tmp_path / "store", target=str(tmp_path / "8.6.yaml"))
    model = tiny_onnx(tmp_path / "tiny.onnx", **model)
    return compiling.examined(model, tmp_path / "examined.log", job.backend, name="student.onnx")


def test_what_the_release_would_refuse_is_not_compiled(tmp_path):
    with pytest.raises(StageError) as caught:
        examined(tmp_path, operator="Hardmax", opset=17)
    assert str(caught.value).splitlines() == [
        "error: backend tensorrt cannot run student.onnx: activation: Hardmax is taken from TensorRT 10.0 on, not by"
        " 8.6.2; write it as simpler operators",
        "       1 problem in all",
        "fix:   change the network, or choose another backend: --backend NAME, see edgekd list backends",
    ]


def test_a_compiler_that_crashes_here_says_nothing_of_the_board(tmp_path, monkeypatch):
    def crash(self, onnx, log):
        raise StageError("tensorrt_rtx, compiling tiny.onnx: it crashed (SIGABRT)")

    monkeypatch.setattr(TensorRT, "examine", crash)
    found = examined(tmp_path)
    assert (found["evidence"], found["findings"]) == ("linted", [])
    assert found["compiled"] == {"alarms": ["tensorrt_rtx, compiling tiny.onnx: it crashed (SIGABRT)"], "layers": []}


# ---------------------------------------------------------------- what really ran


def test_layers_that_ask_for_int8_and_run_in_float_raise_an_alarm(build, board, tmp_path):
    made = build(tensorrt_stand_in.bundle(tmp_path / "int8", int8=True))
    assert {row["ran"] for row in made.layers if row["asked"] == "int8"} == {"int8"} and made.alarms == []
    board.fails_by("float")
    made = build(tensorrt_stand_in.bundle(tmp_path / "again", int8=True, optimization_level=1))
    assert (made.layers[0]["asked"], made.layers[0]["ran"]) == ("int8", "fp32")
    asked = sum(row["asked"] == "int8" for row in made.layers)
    assert made.alarms == [f"1 of {asked} layers that ask for INT8 run in float: kernel"]


def test_layers_that_an_accelerator_left_to_the_gpu_raise_an_alarm(build, tmp_path):
    made = build(tensorrt_stand_in.bundle(tmp_path / "dla", dla_core=0))
    assert [row["ran"] for row in made.layers] == ["on the DLA", "fp32"]
    assert made.alarms == ["the DLA was asked for, and the GPU computes 1 layers: classifier"]


def test_11_4_reads_a_model_as_an_accelerator_takes_it(tmp_path):
    board = tensorrt_stand_in.Board(tmp_path / "board", release="11.4.1")
    job = make_job(tmp_path / "store", target="jetson")
    job.device = f"local:?python={board.python}"
    for folder in ("out", "work"):
        (tmp_path / folder).mkdir()
    bundle = tensorrt_stand_in.bundle(tmp_path / "dla", dla_core=0, version="11.4.1")
    stages.build("student", job, {"engine-student": bundle}, tmp_path / "out", tmp_path / "work")
    head = json.loads((tmp_path / "out" / stages.ENGINE / "model.plan").read_bytes().partition(b"\n")[0])
    assert (head["parsing"], head["flags"]) == (["ADJUST_FOR_DLA"], ["GPU_FALLBACK"])


def test_alarms_name_the_layers_that_run_otherwise(tmp_path):
    rows = [
        {"layer": f"conv{at}", "asked": "int8", "ran": "fp16" if at < 7 else "int8", "kernel": "k"} for at in range(9)
    ]
    assert built.float_alarm(rows) == [
        "7 of 9 layers that ask for INT8 run in float: conv0, conv1, conv2, conv3, conv4 and 2 more"
    ]
    assert built._gpu_alarm(["a", "b"]) == ["the DLA was asked for, and the GPU computes 2 layers: a, b"]


# ---------------------------------------------------------------- the whole way


@pytest.mark.slow
def test_a_run_ends_with_engines_that_were_built_and_measured_there(own_done, board):
    job = make_job(own_done.store, target="jetson")
    job.device = f"local:?python={board.python}"
    assert [one.action for one in pipeline.plan(job, "bench")][-3:] == ["run", "run", "run"]
    made = pipeline.run(job, "bench")
    assert made["build-teacher"].result["evidence"] == "built_on_device"
    found = made["bench"].result
    assert found["engines"]["student"]["built"] == []  # it was sent, not built once more
    assert found["engines"]["student"]["runtime"] == "tensorrt"
    logits = np.load(made["bench"].file("student_logits.npy"))
    np.testing.assert_allclose(logits, np.load(made["onnx-student"].file(stages.LOGITS)), rtol=1e-3, atol=1e-4)
