"""The stage table: what reruns when something changes, and what a run leaves behind, on the cheapest real job."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_job import TINY, make_job

from edgekd import pipeline, stage_table
from edgekd import target as targets
from edgekd.artifact import LOG
from edgekd.errors import CheckpointError, MissingError, RecipeError, StoreError

BENCH = {"bench"}
ENGINES = {"engine-teacher", "engine-student"} | BENCH
ONNX = {"onnx-teacher", "onnx-student"} | ENGINES
STUDENT = {"student", "onnx-student", "engine-student"} | BENCH
BOTH_STUDENTS = {"scratch"} | STUDENT
TEACHER = {"teacher", "onnx-teacher", "engine-teacher"} | STUDENT
ALL = TEACHER | BOTH_STUDENTS


def rerun(job, last: str = "bench") -> set[str]:
    return {planned.stage for planned in pipeline.plan(job, last) if planned.action != "reuse"}


# --- what a change reruns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("name=other", BENCH),
        ("description=other", BENCH),
        ("seed=1", ALL),
        ("data.validation=0.2", ALL),
        ("data.train_limit=150", ALL),
        ("data.test_limit=49", ALL),
        ("data.seed=1", ALL),
        ("data.normalize={mean: [0.5], std: [0.5]}", ALL),
        ("data.augment.crop=1", ALL),
        ("teacher.depth=14", TEACHER),
        ("teacher.activation=swish", TEACHER),
        ("teacher.train.epochs=2", TEACHER),
        ("teacher.train.lr=0.05", TEACHER),
        ("student.width=0.5", BOTH_STUDENTS),
        ("student.activation.lma.k=4", BOTH_STUDENTS),
        ("student.activation=relu", BOTH_STUDENTS),
        ("distill.train.epochs=2", BOTH_STUDENTS),
        ("distill.method=scratch", STUDENT),
        ("distill.temperature=2", STUDENT),
        ("distill.kd_weight=0.5", STUDENT),
        ("distill.scratch=false", BENCH),
        ("distill.cache_teacher=true", BENCH),
        ("export.batch=static", ONNX),
        ("export.opset=18", ONNX),
        ("export.form=nested_where", ONNX),
        ("export.tolerance=1e-4", ONNX),
        ("benchmark.seconds=0.2", BENCH),
        ("benchmark.accuracy_samples=10", BENCH),
        ("budgets.accuracy_drop=0.5", BENCH),
        ("budgets.p99_ms=5", BENCH),
    ],
)
def test_a_changed_option_reruns_exactly_the_stages_below_it(done, override, stages):
    assert rerun(make_job(done.store, override)) == stages


@pytest.mark.parametrize(
    "override", ["teacher.depth=8", "distill.kd_weight=0.7", "student.activation.lma.k=8", "export.opset=20"]
)
def test_a_default_that_is_spelled_out_reruns_nothing(done, override):
    assert rerun(make_job(done.store, override)) == BENCH


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("threads: 2", ENGINES),
        ("opset: 19", ONNX),
        ("backends: [{onnxruntime: {graph_optimization: basic}}]", ENGINES),
        ("backends: [{onnxruntime: {graph_optimization: all}}]", BENCH),
        ("description: other", BENCH),
    ],
)
def test_a_changed_target_reruns_exactly_the_stages_below_it(done, tmp_path, change, stages):
    file = tmp_path / "mine.yaml"
    keys = {"name": "name: mine", "backends": "backends: [onnxruntime]", change.split(":")[0]: change}
    file.write_text("\n".join(keys.values()))
    assert rerun(make_job(done.store, target=str(file))) == stages


def test_a_changed_network_of_the_users_own_reruns(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = []
    for text in ("", "# changed"):
        Path("mine.py").write_text(text)
        (planned, *_) = pipeline.plan(make_job(done.store, "teacher.network=mine:Net"), "teacher")
        keys.append(planned.key)
    assert keys[0] != keys[1]


def test_a_checkpoint_reruns_by_its_content_not_by_its_path(done, tmp_path):
    keys = []
    for name, content in (("a.pt", "1"), ("b.pt", "1"), ("a.pt", "2")):
        (tmp_path / name).write_text(content)
        (planned, *_) = pipeline.plan(make_job(done.store, f"teacher.checkpoint={tmp_path / name}"), "teacher")
        keys.append(planned.key)
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(CheckpointError) as caught:
        pipeline.plan(make_job(done.store, "teacher.checkpoint=nowhere.pt"), "teacher")
    assert str(caught.value).splitlines() == [
        'error: teacher.checkpoint = "nowhere.pt": there is no such file',
        "       expected: a safetensors file or a torch state dict",
        "fix:   correct the path, or drop it to train the teacher here",
    ]


def test_moved_data_rerun_nothing(done, tmp_path):
    import numpy as np

    generator = np.random.default_rng(0)
    keys = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        file = tmp_path / place / "images.npz"
        if not keys:
            images, labels = generator.integers(0, 256, (30, 8, 8), dtype=np.uint8), np.arange(30) % 3
            np.savez(file, images=images, labels=labels)
        else:
            (tmp_path / "here" / "images.npz").rename(file)
        (planned, *_) = pipeline.plan(make_job(done.store, "data.source=npz", f"data.path={file}"), "teacher")
        keys.append(planned.key)
    assert keys[0] == keys[1]


# --- a run --------------------------------------------------------------------------------------------------------


def events(job, last: str) -> list[tuple[str, str]]:
    seen = []
    pipeline.run(job, last, lambda event: seen.append((event.stage, event.what)))
    return seen


def test_a_run_does_what_was_planned(own_done):
    job = make_job(own_done.store, "distill.temperature=2")
    planned = [(one.stage, one.action) for one in pipeline.plan(job, "student")]
    assert planned == [("teacher", "reuse"), ("scratch", "reuse"), ("student", "run")]
    assert [event for event in events(job, "student") if event[1] != "done"] == planned
    assert rerun(job, "student") == set()


def test_each_command_runs_its_stages(done):
    job = make_job(done.store)
    wanted = {
        command: [stage.name for stage in stage_table.needed(job, last)] for command, last in stage_table.LAST.items()
    }
    assert wanted["distill"] == ["teacher", "scratch", "student"]
    assert wanted["export"] == [*wanted["distill"], "onnx-teacher", "onnx-student"]
    assert wanted["compile"] == [*wanted["export"], "engine-teacher", "engine-student"]
    assert wanted["run"] == wanted["bench"] == [*wanted["compile"], "bench"]


def test_the_manifests_say_how_it_was_made(done):
    _, artifacts = pipeline.recorded(make_job(done.store).store)
    for artifact in artifacts.values():
        manifest = artifact.manifest
        assert {"torch", "onnxruntime", "edgekd"} <= set(manifest["versions"])
        assert manifest["seconds"] >= 0 and manifest["created"] and manifest["host"]["python"]
    digests = {name: artifact.digest for name, artifact in artifacts.items()}
    assert artifacts["student"].manifest["inputs"] == {"teacher": digests["teacher"]}
    assert artifacts["bench"].manifest["inputs"] == {name: digests[name] for name in ENGINES - BENCH}


def test_only_logs_depend_on_the_clock(done, tmp_path):
    again = make_job(tmp_path / "again")
    made = pipeline.run(again, "teacher")
    _, artifacts = pipeline.recorded(make_job(done.store).store)
    assert made["teacher"].digest == artifacts["teacher"].digest
    assert any(file["path"].startswith(f"{LOG}/") for file in made["teacher"].manifest["files"])


def test_nothing_is_left_in_the_scratch_space_but_locks(done):
    assert {path.name for path in (done.store / "work").rglob("*") if path.is_file()} <= {"lock"}


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_anywhere_in_the_store_is_named(own_done):
    job = make_job(own_done.store)
    files = [file for file in (own_done.store / "store").rglob("*") if file.is_file() and file.parts[-3] != "bench"]
    files = [file for file in files if "bench" not in file.parts]
    assert len({file.name for file in files}) >= 6 and any(LOG in file.parts for file in files)
    for file in files:
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(StoreError) as caught:
            pipeline.plan(job, "bench")
        assert str(caught.value).startswith(f"error: {file} ") and "rm -r " in caught.value.fix
        file.write_bytes(whole)
    assert rerun(job) == BENCH


def test_what_would_fail_late_is_found_before_anything_is_trained(tmp_path):
    for override, what in (
        ("distill.temperature=-1", "distill.temperature"),
        ("student.network=nowhere:Net", "nowhere"),
        ("student.depth=9", "depth"),
    ):
        job = make_job(tmp_path / "store", override)
        with pytest.raises(RecipeError, match=what):
            pipeline.run(job, "bench")
        assert not (tmp_path / "store" / "store").exists()


def test_a_precision_that_the_backend_does_not_compute_is_told_before_training(tmp_path):
    job = make_job(tmp_path / "store", "quantize.method=fp16")
    job.target = targets.with_backend(job.target, "tvm")
    with pytest.raises(RecipeError) as caught:
        pipeline.run(job, "bench")
    assert str(caught.value).splitlines()[1:] == [
        "       tvm computes: fp32, int8",
        "fix:   --set quantize.method=ptq, or another backend: --backend onnxruntime",
    ]
    assert caught.value.what == "quantize.method = fp16 makes fp16, which backend tvm does not compute"
    assert not (tmp_path / "store" / "store").exists()


def test_an_engine_for_a_gpu_that_is_not_here_is_told_before_training(tmp_path):
    job = make_job(tmp_path / "store")
    job.target = targets.with_backend(job.target, "{tvm: {gpu: sm_35}}")
    with pytest.raises(MissingError) as caught:
        pipeline.run(job, "bench")
    assert str(caught.value).splitlines() == [
        f"error: what backend tvm makes for target {job.target.name} does not run on this machine",
        "       its options name another processor, or a GPU that is not here",
        "fix:   --device ssh://USER@HOST, or another --target or --backend",
    ]
    assert not (tmp_path / "store" / "store").exists()


def test_a_device_that_no_transport_reaches(done):
    job = make_job(done.store)
    job.device = "carrier-pigeon://coop"
    with pytest.raises(RecipeError, match="carrier-pigeon"):
        pipeline.plan(job, "bench")
    assert rerun(job, "engine-student") == set()


def test_runs_that_are_not_there(done, tmp_path):
    with pytest.raises(RecipeError) as caught:
        pipeline.recorded(make_job(tmp_path / "empty").store)
    assert str(caught.value).splitlines() == [
        f"error: there is no run in {tmp_path / 'empty'}",
        "       a run leaves its record there",
        "fix:   make one: edgekd run digits",
    ]
    with pytest.raises(RecipeError) as caught:
        pipeline.recorded(make_job(done.store).store, "2026")
    assert str(caught.value).splitlines()[0] == 'error: run = "2026" is not a known run'


def test_a_run_whose_artifact_is_gone(own_done):
    store = make_job(own_done.store).store
    content, artifacts = pipeline.recorded(store)
    artifacts["student"].folder.rename(own_done.store / "elsewhere")
    with pytest.raises(StoreError) as caught:
        pipeline.recorded(store)
    assert str(caught.value).splitlines() == [
        f"error: {own_done.store}: the artifact student/{content['artifacts']['student'][:12]} is gone",
        f"       the run {own_done.run_id} needs it",
        "fix:   make it again: edgekd run tiny.yaml",
    ]


# --- two at once --------------------------------------------------------------------------------------------------


def test_two_runs_at_once(edgekd, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ("distill", "tiny.yaml", "--set", "distill.scratch=false", "--json")
    processes = [edgekd.start(*arguments) for _ in range(2)]
    ended = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    reports = [json.loads(out) for out, _ in ended]
    assert reports[0]["artifacts"] == reports[1]["artifacts"]
    told = [line for _, err in ended for line in err.splitlines()]
    for stage in ("teacher", "student"):
        assert len([line for line in told if stage in line and "done in" in line]) == 1
        assert len([line for line in told if stage in line and "reused" in line]) == 1
    assert len(os.listdir(tmp_path / ".edgekd" / "store" / "student")) == 1


def test_a_board_without_an_address_cannot_be_measured_on(tmp_path):
    job = make_job(tmp_path / "store", target="jetson")
    with pytest.raises(MissingError) as caught:
        pipeline.plan(job, "bench")
    assert str(caught.value).splitlines() == [
        "error: target jetson-orin-nano is a board, and no device is named",
        "       everything up to edgekd compile works without one",
        "fix:   --device ssh://USER@HOST",
    ]
    assert [one.stage for one in pipeline.plan(job, "build-student")][-1] == "engine-student"


def test_engines_are_built_on_the_board_that_is_named(tmp_path):
    job = make_job(tmp_path / "store", target="jetson")
    job.device = "ssh://orin"
    planned = [one.stage for one in pipeline.plan(job, "bench")]
    assert planned[-5:] == ["engine-teacher", "engine-student", "build-teacher", "build-student", "bench"]


def test_a_board_that_does_not_answer_is_told_before_training(tmp_path):
    job = make_job(tmp_path / "store")
    job.device = "ssh://nobody@127.0.0.1:1"
    with pytest.raises(MissingError, match=r'device "ssh://nobody@127\.0\.0\.1:1": '):
        pipeline.run(job, "bench")
    assert not list((tmp_path / "store").glob("store/*/*"))
