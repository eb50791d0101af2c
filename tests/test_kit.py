"""A benchmark that is carried to a board and back: packed, run by itself, imported."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest
import tensorrt_stand_in
from tiny_job import make_job

from edgekd import importing, kit, pipeline, registry, stages
from edgekd.artifact import Store
from edgekd.device import Device
from edgekd.device.signature import sign
from edgekd.errors import RecipeError, StageError
from edgekd.stage_table import last_stage

BOARD = """\
name: my-board
backends: [{backend}]
board: {{soc: none, memory_gb: [1]}}
"""


def python_with(folder, *packages):
    """An interpreter that has these packages and nothing else beside the standard library."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/*/site-packages")
    for name in packages:
        for part in (name, f"{name}.libs"):
            found = Path(find_spec(name).origin).parents[1] / part
            if found.exists():
                (site / part).symlink_to(found)
    return folder / "bin" / "python3"


def packed(store, target, folder, *overrides):
    """The kit of the tiny job, unpacked: its folder."""
    job = make_job(store, *overrides, target=str(target))
    assert last_stage("run", job) == last_stage("export", job) == "kit"
    made = pipeline.run(job, "kit")["kit"]
    with tarfile.open(made.file(stages.ARCHIVE)) as archive:
        archive.extractall(folder, filter="data")
    return folder / kit.FOLDER


def run(python, folder, **variables):
    env = os.environ | {name: str(value) for name, value in variables.items()}
    return subprocess.run([str(python), "run.py"], cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def carried(done, tmp_path_factory):
    """A store whose run ended in a kit for a board with the null backend, and the kit's folder, run once."""
    folder = tmp_path_factory.mktemp("carried")
    store = Path(shutil.copytree(done.store, folder / "store"))
    (folder / "board.yaml").write_text(BOARD.format(backend='"null"'))
    there = packed(store, folder / "board.yaml", folder / "sdcard")
    finished = run(python_with(folder / "venv", "numpy"), there)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1].endswith("where the kit was made: edgekd import results.json")
    return store, there


def test_what_a_kit_measured_becomes_a_report(carried, main, tmp_path):
    store, there = carried
    code, out, err = main("import", there / "results.json", "--store", store, "--json")
    assert code in (0, 5, 6), err  # as the machine's state and the recipe's budgets have it
    document = json.loads(out)
    assert document["latency"]["student"]["n"] >= 64 and document["verdict"]["speedup"]["by_launch"]
    assert document["ladder"][-1]["rung"] == "device" and document["ladder"][-1]["n"] == 50
    assert document["command"] == f"edgekd import {there / 'results.json'}"
    assert main("report", "--store", store)[1].strip().endswith(f"{document['run_id']}/report.html")


def test_a_kit_holds_models_samples_and_how_to_run_them(carried):
    _, there = carried
    assert {
        "README.md",
        "run.py",
        "kit.json",
        "spec.json",
        "samples.npy",
        "onnx/student.onnx",
        "onnx/teacher.onnx",
    } <= {path.relative_to(there).as_posix() for path in there.rglob("*")}
    readme = (there / "README.md").read_text()
    assert "Measure tiny on my-board" in readme and "$" not in readme
    assert "    python3 -m agent bench spec.json" in readme


MODES = {
    "single_stream": [],
    "multi_stream": ["samples_per_query=3"],
    "offline": ["batches=[1, 4]"],
    "fps": ["fps=100", "end_to_end=true"],
    "sustained": [],
}
# What only this mode finds.
FINDS = {
    "single_stream": lambda mode: mode["name"] == "single_stream",
    "multi_stream": lambda mode: mode["samples_per_query"] == 3,
    "offline": lambda mode: [row["batch"] for row in mode["sweep"]["student"]] == [1, 4],
    "fps": lambda mode: mode["fps"] == 100 and 0 <= mode["models"]["student"]["missed_share"] <= 1,
    "sustained": lambda mode: sorted(mode["windows"][-1]["rank"]) == ["student", "teacher"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.names("mode"))
def test_a_kit_measures_in_every_mode(done, main, tmp_path, name):
    """From the archive to the report; with pictures where frames come on a clock."""
    store = Path(shutil.copytree(done.store, tmp_path / "store"))
    (tmp_path / "board.yaml").write_text(BOARD.format(backend='{"null": {latency_ms: 0.3}}'))
    options = [f"mode={name}", "seconds=0.3", *MODES[name]]
    there = packed(store, tmp_path / "board.yaml", tmp_path / "sdcard", *(f"benchmark.{one}" for one in options))
    finished = run(sys.executable, there)
    assert finished.returncode == 0, finished.stderr
    code, out, err = main("import", there / "results.json", "--store", store, "--json")
    assert code in (0, 5, 6), err
    document = json.loads(out)
    assert document["mode"]["name"] == name and FINDS[name](document["mode"])
    assert document["latency"]["student"]["p50_ms"] >= 0.3
    if "end_to_end=true" in options:
        assert document["end_to_end"]["models"]["student"]["steps_ms"]["infer"] >= 0.3


def test_the_same_kit_has_the_same_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    about = {"models": ["student"], "name": "n", "target": "t", "backend": "b", "built_files": [], "commands": []}
    first, second = (kit.packed(tmp_path / name, {"a.txt": tmp_path / "a.txt"}, **about) for name in ("1", "2"))
    assert first == second and (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_kit_runs_under_the_oldest_python(carried, python_3_8, tmp_path):
    there = Path(shutil.copytree(carried[1], tmp_path / "kit"))
    (there / "results.json").unlink()
    finished = run(python_3_8, there)
    assert finished.returncode == 0, finished.stderr
    assert (there / "results.json").exists()


def test_run_py_is_python_3_8():
    ast.parse((kit.HERE / "run.py").read_text(), feature_version=(3, 8))


def test_a_file_that_arrived_damaged_is_named(carried, tmp_path):
    there = Path(shutil.copytree(carried[1], tmp_path / "kit"))
    (there / "agent" / "worker.py").write_text("")
    finished = run(sys.executable, there)
    assert (finished.returncode, finished.stderr) == (
        1, "error: agent/worker.py is not as it was packed: unpack the kit again\n",
    )  # fmt: skip


def test_numpy_is_asked_for_by_name(carried, tmp_path):
    finished = run(python_with(tmp_path / "venv"), carried[1])
    assert finished.returncode == 1
    assert "numpy is not installed for" in finished.stderr and "apt-get install python3-numpy" in finished.stderr


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="no ssh-keygen: apt-get install openssh-client")
def test_a_board_whose_owner_lists_keys_runs_only_a_kit_that_is_signed(carried, tmp_path):
    there = Path(shutil.copytree(carried[1], tmp_path / "kit"))
    (there / "results.json").unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    listed = tmp_path / "home/.edgekd/allowed_signers"
    listed.parent.mkdir(parents=True)
    listed.write_text(f"anna {(tmp_path / 'key.pub').read_text()}")
    refused = run(sys.executable, there, HOME=tmp_path / "home")
    assert (refused.returncode, refused.stdout, refused.stderr) == (
        1, "", f"error: the bundle is not signed, and {listed} asks for a signature\n",
    )  # fmt: skip
    sign(there / "kit.json", str(tmp_path / "key"))
    finished = run(sys.executable, there, HOME=tmp_path / "home")
    assert finished.returncode == 0, finished.stderr
    job = json.loads((there / "results.json").read_text())["jobs"]["bench"]
    assert json.loads(base64.b64decode(job["files"]["result.json"]["base64"]))["device"]["signed_by"] == "anna"


# ---------------------------------------------------------------- results that are not what they should be


@pytest.fixture
def results(carried, tmp_path):
    """results(change) writes the results after a change, sealed anew unless `sealed` is False."""
    _, there = carried

    def write(change, sealed=True):
        content = json.loads((there / "results.json").read_text())
        seal = content.pop("seal")
        change(content)
        if sealed:
            seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        file = tmp_path / "results.json"
        file.write_text(json.dumps({**content, "seal": seal}))
        return file

    return write


def imported(store, file):
    job = importing.job_of_kit(Store(store), file, run_id="29990101-imported", created="now", command="edgekd import")
    return pipeline.run(job, "bench")


def asked(there, file, folder):
    """What an import asks of the results, but for what it makes of them."""
    device = Device(f"kit:{file}", folder / "jobs")
    with device.job() as job:
        job.put({"spec.json": there / "spec.json"})
        device.facts()
        job.get("student_logits.npy", folder / "logits.npy", limit_bytes=4000)


def content_of(data):
    return {"sha256": hashlib.sha256(data).hexdigest(), "base64": base64.b64encode(data).decode()}


def put_file(name, listed):
    return lambda content: content["jobs"]["bench"]["files"].__setitem__(name, listed)


@pytest.mark.parametrize(
    ("change", "sealed", "what"),
    [
        (lambda content: content.update(kit="x"), False, "its sha256 is not the one in it"),
        (lambda content: content.update(edgekd_results=2), True, "edgekd_results = 2"),
        (lambda content: content["jobs"]["bench"].pop("spec"), True, "it holds no benchmark"),
        (lambda content: content["jobs"].pop("bench"), True, "it has no results of bench"),
        (put_file("result.json", {"sha256": "0", "base64": "e30="}), True, "the sha256 of result.json is not the one"),
        (put_file("result.json", {"sha256": "0", "base64": "?"}), True, "result.json is not in base64"),
        (put_file("result.json", content_of(b"[" * 100000)), True, "not what the agent writes"),
        (put_file("student_logits.npy", content_of(b"0" * 5000)), True, "logits.npy from the device has 5000 bytes"),
        (lambda content: content["jobs"]["bench"]["files"].pop("student_logits.npy"), True, "was not written on"),
        (lambda content: content["jobs"]["bench"]["spec"].update(seed=9), True, "is of another kit: spec.json differs"),
        (
            lambda content: content["jobs"]["bench"]["spec"]["files"].update({"samples.npy": "0"}), True,
            "is of another kit: samples.npy differs",
        ),
    ],
)  # fmt: skip
def test_results_that_cannot_be_believed_are_refused(carried, results, tmp_path, change, sealed, what):
    with pytest.raises(StageError) as caught:
        asked(carried[1], results(change, sealed), tmp_path)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "not what the agent writes"),
        ("[]", "a JSON list, not an object"),
        ('{"a":' * 40 + "1" + "}" * 40, "more than 16 levels deep"),
        ("\udcff", "it is no text"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path, content, what):
    (tmp_path / "results.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(StageError, match=what):
        imported(tmp_path, tmp_path / "results.json")


def test_a_results_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError) as caught:
        imported(tmp_path, tmp_path / "results.json")
    assert str(caught.value).splitlines() == [
        f"error: {tmp_path / 'results.json'}: there is no such file",
        "       expected: the results.json that a kit's run.py wrote",
        "fix:   copy it from the board, or run there: python3 run.py",
    ]


def test_results_of_a_kit_of_another_store(carried, done):
    with pytest.raises(RecipeError, match=r"is of a kit that no run in .* has made"):
        imported(done.store, carried[1] / "results.json")


# ---------------------------------------------------------------- with runtimes


@pytest.mark.slow
def test_a_raspberry_pi_without_ssh(own_done, main, tmp_path):
    there = packed(own_done.store, "raspberry-pi-5", tmp_path / "sdcard")
    finished = run(python_with(tmp_path / "venv", "numpy", "onnxruntime"), there)
    assert finished.returncode == 0, finished.stderr
    made = imported(own_done.store, there / "results.json")
    assert made["bench"].result["engines"]["student"]["runtime"] == "onnxruntime"
    assert abs(made["bench"].result["accuracy"]["student"]["score"] - made["engine-student"].result["score"]) <= 0.02


@pytest.mark.slow
@pytest.mark.skipif(bool(tensorrt_stand_in.missing()), reason=tensorrt_stand_in.missing())
def test_a_jetson_without_ssh_builds_its_engines_itself(own_done, tmp_path):
    board = tensorrt_stand_in.Board(tmp_path / "board")
    there = packed(own_done.store, "jetson", tmp_path / "sdcard")
    assert "# or: cd student && trtexec --onnx=model.onnx" in (there / "README.md").read_text()
    # Where trtexec alone is, its times are told, since nothing else can be measured.
    nano = shutil.copytree(there, tmp_path / "nano")
    finished = run(tensorrt_stand_in.Board(tmp_path / "trtexec", module=False).python, nano)
    assert "student, kernels alone: median 0.8 ms" in finished.stdout.splitlines()
    (error,) = finished.stderr.splitlines()
    assert error.startswith("error: the benchmark ended without a result: ") and "before TensorRT 8.5" in error
    board.fails_by("memory")
    assert "Cuda Runtime (out of memory)" in run(board.python, there).stderr
    board.fails_by("")
    finished = run(board.python, there)
    assert finished.returncode == 0, finished.stderr
    made = imported(own_done.store, there / "results.json")
    assert made["build-student"].result["evidence"] == "built_on_device"
    assert made["build-student"].result["size_bytes"] == (there / "student" / "model.plan").stat().st_size
    assert not made["build-student"].file(stages.ENGINE).joinpath("model.plan").exists()  # it stays on the board
    assert made["bench"].result["engines"]["student"]["runtime"] == "tensorrt"
