"""The command line in processes of its own: signals, pipes, two runs at once, an install without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from command_line import error, stored, without
from tiny_job import TINY

from edgekd import registry


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"], ["list"], ["schema"], ["doctor"], ["plan", "tiny.yaml"], ["run", "tiny.yaml", "--dry-run"],
        ["report"], ["init"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_an_install_without_torch(arguments, own_done, tmp_path, edgekd):
    (tmp_path / "tiny.yaml").write_text(TINY)
    env = {**without("torch", tmp_path), "EDGEKD_STORE": str(own_done.store)}
    ran = edgekd(*arguments, env=env)
    assert (ran.returncode, ran.stderr.replace("next: edgekd run\n", "")) == (0, "") and ran.stdout


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["distill"], "error: method \"kd\" cannot be imported: No module named 'torch'"),
        (["export", "--set", "export.batch=static"], "error: the Python package 'torch' is not installed"),
    ],
)
def test_training_without_torch(arguments, what, own_done, tmp_path, edgekd):
    (tmp_path / "tiny.yaml").write_text(TINY)
    store = own_done.store if "export" in arguments else tmp_path / "new"
    ran = edgekd(*arguments[:1], "tiny.yaml", *arguments[1:], "--store", store, "-q", env=without("torch", tmp_path))
    assert (ran.returncode, ran.stdout, error(ran.stderr)) == (3, "", what)


def test_the_null_backend_needs_no_runtime(own_done, tmp_path, edgekd, monkeypatch):
    form = registry.create("backend", "onnxruntime").forms["any"]
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "nothing.yaml").write_text('name: nothing\nbackends: ["null"]\n')
    arguments = ("--set", f"export.form={form}", "--target", "nothing.yaml", "--store", own_done.store, "--json")
    ran = edgekd("compile", "tiny.yaml", *arguments, env=without("onnxruntime", tmp_path))
    assert ran.returncode == 0, ran.stderr
    told = [" ".join(line.split()[1:]) for line in ran.stderr.splitlines()]
    assert [line for line in told if "reused" in line] == [
        f"{stage} reused" for stage in ("teacher", "scratch", "student", "onnx-teacher", "onnx-student")
    ]
    assert json.loads(ran.stdout)["target"]["name"] == "nothing"


# What may be imported is told by -X importtime; that a user waits for it, by the clock.
SLOW = ("torch", "numpy", "pydantic", "onnxruntime", "onnx", "rich", "matplotlib", "sklearn")


def imported(*arguments: str) -> set[str]:
    argv = [sys.executable, "-X", "importtime", "-m", "edgekd", *arguments]
    ran = subprocess.run(argv, capture_output=True, text=True, check=True)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in ran.stderr.splitlines() if "|" in line}


def test_help_imports_nothing_slow():
    assert not imported("--help") & set(SLOW)


def test_a_dry_run_imports_nothing_heavy(done, tiny):
    heavy = {"torch", "onnx", "onnxruntime", "matplotlib", "accelerate", "jinja2"}
    assert not imported("run", "tiny.yaml", "--dry-run", "--store", str(done.store)) & heavy


def fastest(argv: list[object]) -> float:
    """Seconds of processor time; the least of three, for other programs only ever add to it."""
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run(list(map(str, argv)), stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(seconds)


def test_help_and_a_dry_run_are_fast(done, tiny):
    assert fastest([sys.executable, "-m", "edgekd", "--help"]) < 0.4
    assert fastest([sys.executable, "-m", "edgekd", "run", "tiny.yaml", "--dry-run", "--store", done.store]) < 2


def test_a_reader_that_has_seen_enough(edgekd):
    for arguments in (["list"], ["list", "--json"], ["schema"], ["--help"]):
        process = edgekd.start(*arguments)
        process.stdout.close()
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")


def wait_for(condition, process, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def test_ctrl_c_leaves_what_the_next_run_resumes(tmp_path, edgekd):
    (tmp_path / "tiny.yaml").write_text(TINY)
    process = edgekd.start("distill", "tiny.yaml", "--set", "teacher.train.epochs=100000")
    checkpoints = (tmp_path / ".edgekd" / "work").glob
    wait_for(lambda: any(checkpoints("*/training/checkpoint.pt")), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted: the next run goes on from here" and "Traceback" not in err
    assert stored(tmp_path / ".edgekd") == [] and any(checkpoints("*/training/checkpoint.pt"))
    assert not any(path.name.startswith("partial") for path in (tmp_path / ".edgekd").rglob("*"))
