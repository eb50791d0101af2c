"""The agent by itself: as the folder that a board gets, run by a Python that knows nothing of edgekd."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import board_files
import numpy as np
import pytest
from waiting import wait_until

from edgekd.backends import write_settings
from edgekd.backends.null import Null
from edgekd.device import AGENT

NAMES = ("student", "teacher")
TURN = {"samples": 1, "every_ns": 0, "block_seconds": 0.02, "end_to_end": False}
SOURCES = sorted(AGENT.glob("*.py"))


def make_board(tmp_path):
    """A job's folder: the agent, two null engines of 0.2 and 0.4 ms, 12 samples, a short spec."""
    shutil.copytree(AGENT, tmp_path / "agent", ignore=shutil.ignore_patterns("__pycache__"))
    for latency_ms, name in zip((0.2, 0.4), NAMES, strict=True):
        (tmp_path / name).mkdir()
        settings = {"backend": "null", "threads": 1, "image": [1, 4, 4], "answer": [3], "latency_ms": latency_ms}
        write_settings(tmp_path / name, settings)
        shutil.copyfile(Null.runner, tmp_path / f"{name}_runner.py")
    np.save(tmp_path / "samples.npy", np.zeros((12, 1, 4, 4), np.float32))
    write_spec(tmp_path)
    return tmp_path


@pytest.fixture
def board(tmp_path):
    return make_board(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A board after a benchmark of two launches, and what the agent said meanwhile."""
    board = make_board(tmp_path_factory.mktemp("board"))
    write_spec(board, launches=2, min_queries=64)
    finished = bench(board)
    assert finished.returncode == 0, finished.stderr
    return board, finished.stderr


def write_spec(board, **changes):
    files = {
        str(file.relative_to(board)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in board.rglob("*")
        if file.is_file() and file.name != "spec.json"
    }
    spec = {
        "version": 1,
        "turns": [TURN],
        "launches": 1,
        "models": [{"name": name, "folder": name, "runner": f"{name}_runner.py"} for name in NAMES],
        "samples": "samples.npy",
        "pictures": None,
        "files": files,
        "min_seconds": 0.1,
        "max_seconds": 20.0,
        "min_queries": 1,
        "lock_clocks": False,
        "seed": 0,
    }
    (board / "spec.json").write_text(json.dumps(spec | changes))


def bench(board, *options):
    argv = [sys.executable, "-m", "agent", "bench", "spec.json", *options]
    return subprocess.run(argv, cwd=board, capture_output=True, text=True, timeout=60, check=False)


def error_of(finished):
    assert finished.returncode == 1, finished.stderr
    assert not Path("result.json").exists()
    return json.loads(finished.stderr.splitlines()[-1])["error"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_python_3_8_the_standard_library_and_numpy_are_enough(source):
    tree = ast.parse(source.read_text(), feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    # Pictures in an image format are decoded by Pillow where the machine has it; nothing else asks for it.
    optional = {"PIL"} if source.name == "pictures.py" else set()
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names | {"numpy"} | optional


def test_an_old_python_without_numpy_says_what_it_is(board, python_3_8):
    argv = [python_3_8, "-S", "-m", "agent", "facts"]  # without its packages
    finished = subprocess.run(argv, cwd=board, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    facts = json.loads(finished.stdout)
    assert facts["python"].startswith("3.8.") and facts["numpy"] is None


def test_a_benchmark_leaves_latencies_logits_and_a_result(done):
    board, _ = done
    result = json.loads((board / "result.json").read_text())
    for name, latency_ms in zip(NAMES, (0.2, 0.4), strict=True):
        table = np.load(board / f"{name}_latency.npy", allow_pickle=False)
        assert table.dtype == np.int64
        assert set(table[:, 0]) == {0, 1}
        assert len(table) >= 64
        assert table[:, 3].min() / 1e6 == pytest.approx(latency_ms, rel=0.2)  # the median is the machine's
        assert np.load(board / f"{name}_logits.npy", allow_pickle=False).shape == (12, 3)
        for launch in result["models"][name]:
            assert launch["facts"]["runtime"] == "null"
            assert launch["warm_up"][0]["queries"] > 9
            assert launch["load_ms"] > 0
            assert 0 < launch["rss_before_load_bytes"] <= launch["peak_rss_bytes"]
    for row in result["telemetry"]:
        assert {"launch", "time_s", "seconds", "own_cpu_s", "foreign_cpu_s", "steal_s", "temperature_c"} <= set(row)


def test_what_is_over_is_measured_anew(board):
    write_spec(board, min_seconds=0.0)
    results = []
    for _ in range(2):
        assert bench(board).returncode == 0
        results.append((board / "result.json").read_text())
        assert not list(board.glob("launch_*.json"))
    assert results[0] != results[1]


def test_models_take_turns_so_that_a_linear_drift_cancels(done):
    board, _ = done
    blocks = []
    for name in NAMES:
        table = np.load(board / f"{name}_latency.npy")
        for launch, block in np.unique(table[:, :2], axis=0):
            rows = table[(table[:, 0] == launch) & (table[:, 1] == block)]
            blocks.append((rows[0, 2], rows[-1, 2] + rows[-1, 3], launch, name[0]))
    blocks.sort()
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(blocks))  # never two at a time
    for launch, expected in ((0, "stts"), (1, "tsst")):
        order = "".join(name for *_, number, name in blocks if number == launch)
        assert order == expected * (len(order) // 4)


def test_progress_goes_from_0_to_1(done):
    lines = [json.loads(line) for line in done[1].splitlines()]
    shares = [line["progress"] for line in lines]
    assert shares == sorted(shares)
    assert shares[0] < 0.2
    assert lines[-1] == {"progress": 1.0, "left_s": 0.0, "stage": "done"}
    assert {"load", "measure", "accuracy", "done"} == {line["stage"] for line in lines}


def test_a_slow_engine_is_given_time_for_its_queries(board):
    write_settings(
        board / "teacher", {"backend": "null", "threads": 1, "image": [1, 4, 4], "answer": [3], "latency_ms": 20}
    )
    write_spec(board, min_queries=16, min_seconds=0.0)
    assert bench(board).returncode == 0
    assert len(np.load(board / "teacher_latency.npy")) >= 16


@pytest.mark.parametrize("name", ["student/engine.json", "samples.npy", "teacher_runner.py", "agent/worker.py"])
def test_a_changed_file_is_refused_by_name(board, name):
    content = bytearray((board / name).read_bytes())
    content[-2] ^= 1
    (board / name).write_bytes(content)
    if name.startswith("agent"):
        (board / name).write_bytes((AGENT / "worker.py").read_bytes() + b"\n")
    assert error_of(bench(board)) == f"{name} is corrupted: its sha256 is not the one in the spec"


def test_an_absent_file_is_refused_by_name(board):
    (board / "student/engine.json").unlink()
    assert error_of(bench(board)) == "student/engine.json cannot be read: No such file or directory"


def test_a_spec_of_another_version_is_refused(board):
    write_spec(board, version=2)
    assert error_of(bench(board)) == "spec of version 2: this agent knows version 1"


@pytest.mark.parametrize(
    ("run", "error"),
    [
        ("raise ValueError('no such kernel')", "teacher: ValueError: no such kernel"),
        ("import os; os.kill(os.getpid(), 11)", "teacher: its process died (signal SIGSEGV)"),
        ("import os; os._exit(7)", "teacher: its process died (exit status 7)"),
        ("return x[0, 0, 0]", "teacher: AgentError: answers (4,) for one sample, not logits [1, K, ...]"),
    ],
)
def test_a_runner_that_fails_is_named(board, run, error):
    (board / "teacher_runner.py").write_text(
        f"class Runner:\n    facts = {{}}\n    def run(self, x):\n        {run}\ndef load(folder): return Runner()\n"
    )
    write_spec(board)
    assert error_of(bench(board)) == error


def test_what_a_runtime_prints_does_not_disturb(board):
    noisy = (board / "teacher_runner.py").read_text().replace("until =", "print('{}'); os.write(1, b'x'); until =")
    (board / "teacher_runner.py").write_text(noisy)
    write_spec(board)
    assert bench(board).returncode == 0


def test_an_engine_gets_the_threads_that_it_was_compiled_for(board):
    settings = json.loads((board / "student/engine.json").read_text())
    write_settings(board / "student", settings | {"threads": 3})
    check = "import os\nassert os.environ['OMP_NUM_THREADS'] == '3'\n"
    (board / "student_runner.py").write_text(check + Null.runner.read_text().replace("from __future__", "# from"))
    write_spec(board)
    finished = bench(board)
    assert finished.returncode == 0, finished.stderr


def test_clocks_are_locked_and_power_is_metered_while_it_measures(board, tmp_path_factory):
    root = board_files.write(tmp_path_factory.mktemp("kernel"), board_files.JETSON_ORIN_NANO)
    governor = root / f"{board_files.CPUFREQ}policy0/scaling_governor"
    check = f"with open({str(governor)!r}) as file:\n    assert file.read() == 'performance'\n"
    source = Null.runner.read_text().replace("class Runner", check + "\n\nclass Runner")
    (board / "student_runner.py").write_text(source)
    write_spec(
        board, lock_clocks=True, min_seconds=1.0, turns=[TURN | {"block_seconds": 0.25}]
    )  # long enough for a reading in each
    finished = bench(board, "--root", root)
    assert finished.returncode == 0, finished.stderr
    assert governor.read_text() == "schedutil"
    result = json.loads((board / "result.json").read_text())
    assert result["device"]["power_mode"] == "MAXN_SUPER"
    for name in NAMES:
        (launch,) = result["models"][name]
        module = next(row for row in launch["energy"] if row["rail"] == "VDD_IN")
        assert module["mj"] == pytest.approx(4968 * 1.520 * module["seconds"])
        assert module["samples"] > len(np.load(board / f"{name}_latency.npy"))  # those at the start of a turn too
    assert result["telemetry"][-1]["power_mw"]["VDD_IN"] == pytest.approx(4968 * 1.520)


@pytest.mark.parametrize("victim", ["holder", "agent"])
def test_nothing_stays_behind_when_one_is_killed(board, victim):
    write_spec(board, min_seconds=100, max_seconds=200)
    # The holder stands for edgekd: it starts the agent and keeps its standard input open.
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd="/", env=os.environ | {"BOARD": str(board)}, stdout=subprocess.PIPE
    )
    try:
        agent = int(holder.stdout.readline())
        assert wait_until(lambda: len(processes_in(board)) == 3)
        os.kill(holder.pid if victim == "holder" else agent, signal.SIGKILL)
        assert wait_until(lambda: not processes_in(board))
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


HOLDER = """
import os, subprocess, sys, time
argv = [sys.executable, "-m", "agent", "bench", "spec.json", "--lifeline"]
agent = subprocess.Popen(argv, cwd=os.environ["BOARD"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
print(agent.pid, flush=True)
agent.wait()
time.sleep(60)
"""


def processes_in(folder):
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.readlink() == folder:
                found.append(link.parent.name)
        except OSError:
            pass  # it ended while we looked, or is not ours
    return found
