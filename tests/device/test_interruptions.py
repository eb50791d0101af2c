"""What may happen to a benchmark on a remote board: it goes on, or says why not, and leaves nothing running there."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

import numpy as np
import pytest
import small_disk
from waiting import wait_until

from edgekd.backends import Engine, write_settings
from edgekd.backends.null import Null
from edgekd.bench import benchmark
from edgekd.bench.deployment import ATTEMPTS
from edgekd.bench.modes.single_stream import SingleStream
from edgekd.device import Device, Job, ssh
from edgekd.device.porter import processes_in
from edgekd.errors import ConnectionLost, DiskFull, StageError
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification

LAUNCHES = 6


def measure(url, folder, **options):
    """Benchmark two null engines shortly; the same arguments give the same job."""
    folder.mkdir(exist_ok=True)
    engines = []
    for name, latency_ms in (("a", 0.2), ("b", 0.6)):
        (folder / name).mkdir(exist_ok=True)
        settings = {"backend": "null", "threads": 1, "image": [1, 4, 4], "answer": [3], "latency_ms": latency_ms}
        write_settings(folder / name, settings)
        engines.append(Engine(name, folder / name, Null.runner, "null"))
    samples, judge = np.zeros((12, 1, 4, 4), np.float32), Judge(Classification(), np.arange(12) % 3, (3,))
    device = Device(url, folder / "jobs")
    return benchmark(*engines, samples=samples, judge=judge, device=device, workdir=folder / "work",
                     **({"mode": SingleStream(seconds=0.3), "launches": LAUNCHES} | options))  # fmt: skip


@pytest.fixture
def url(sshd):
    return sshd.url(python=sys.executable)


def jobs(sshd):
    return list((sshd.home / ".edgekd/jobs").glob("job-*"))


def finished_launches(sshd):
    return [file for job in jobs(sshd) for file in job.glob("launch_*.json")]


def agents(sshd):
    """Processes that conduct a benchmark."""
    found = {pid: Path(f"/proc/{pid}/cmdline") for job in jobs(sshd) for pid in processes_in(str(job))}
    return [pid for pid, line in found.items() if b"agent\0bench" in read(line) and b"base64" not in read(line)]


def read(file):
    try:
        return file.read_bytes()
    except OSError:
        return b""


def after_launches(sshd, number, what):
    """Do something as soon as so many launches are measured."""
    thread = threading.Thread(target=lambda: wait_until(lambda: len(finished_launches(sshd)) >= number) and what())
    thread.start()
    return thread


def check(result, sshd, interruptions):
    assert result["interruptions"] == interruptions
    assert len(result["speedup_by_launch"]) == LAUNCHES
    assert result["speedup"]["value"] == pytest.approx(3.0, rel=0.35)  # the machine may be busy
    assert result["telemetry"]["time_s"] == sorted(result["telemetry"]["time_s"])
    assert jobs(sshd) == []


def test_a_connection_lost_in_the_middle_costs_the_launch_that_ran(url, sshd, tmp_path):
    cutter = after_launches(sshd, 2, sshd.cut)
    result = measure(url, tmp_path / "host")
    cutter.join()
    check(result, sshd, interruptions=1)


@pytest.mark.slow
def test_a_connection_lost_after_the_last_launch_costs_nothing(url, sshd, tmp_path, monkeypatch):
    runs, run = [], Job.run

    def lose(job, argv, **options):
        run(job, argv, **options)
        runs.append(argv)
        raise ConnectionLost("lost")

    monkeypatch.setattr(Job, "run", lose)
    check(measure(url, tmp_path / "host"), sshd, interruptions=0)
    assert len(runs) == 1


@pytest.mark.slow
def test_an_agent_that_is_killed_goes_on(url, sshd, tmp_path):
    killer = after_launches(sshd, 1, lambda: [os.kill(pid, signal.SIGKILL) for pid in agents(sshd)])
    result = measure(url, tmp_path / "host")
    killer.join()
    check(result, sshd, interruptions=1)


def test_an_agent_that_is_killed_every_time_is_an_error(sshd, tmp_path, monkeypatch):
    source = Null.runner.read_text()
    (tmp_path / "deadly.py").write_text(source.replace("import os\n", "import os\nos.kill(os.getppid(), 9)\n"))
    monkeypatch.setattr(Null, "runner", tmp_path / "deadly.py")
    with pytest.raises(StageError) as caught:
        measure("local:", tmp_path / "host")
    what = f'benchmark on "local:": the agent was killed {ATTEMPTS} times (signal SIGKILL)'
    assert (caught.value.what, caught.value.fix) == (
        what,
        "see whether the memory there is enough: sudo dmesg | tail",
    )


@pytest.mark.slow
def test_a_board_that_does_not_come_back_keeps_what_was_measured(url, sshd, tmp_path, monkeypatch):
    monkeypatch.setattr(ssh, "RECONNECT_S", 0.3)
    stopper = after_launches(sshd, 2, sshd.stop)
    with pytest.raises(ConnectionLost, match="the connection was lost"):
        measure(url, tmp_path / "host")
    stopper.join()
    assert len(finished_launches(sshd)) >= 2
    assert wait_until(lambda: not [pid for job in jobs(sshd) for pid in processes_in(str(job))])
    sshd.start()
    check(measure(url, tmp_path / "host"), sshd, interruptions=1)


HOST = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from test_interruptions import measure
measure(sys.argv[2], Path(sys.argv[3]), lock_clocks=sys.argv[4] == "True")
"""


def start_host(url, folder, lock_clocks=False):
    """A process of its own that measures."""
    argv = [sys.executable, "-c", HOST, str(Path(__file__).parent), url, str(folder), str(lock_clocks)]
    return subprocess.Popen(argv, stderr=subprocess.DEVNULL)


def kill_host_and_go_on(url, sshd, folder, moment):
    """Kill the host when `moment()` is true; the next run ends well, and nothing of the first one runs on."""
    with start_host(url, folder) as host:
        assert wait_until(lambda: moment() or host.poll() is not None)
        host.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not [pid for job in jobs(sshd) for pid in processes_in(str(job))])
    return measure(url, folder)


def test_a_killed_host_leaves_nothing_running_and_its_launches_are_kept(url, sshd, tmp_path):
    result = kill_host_and_go_on(url, sshd, tmp_path / "host", lambda: len(finished_launches(sshd)) >= 2)
    check(result, sshd, interruptions=1)


@pytest.mark.slow
def test_a_host_killed_at_any_time_is_followed_by_a_clean_run(url, sshd, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(4):
        at = time.monotonic() + rng.uniform(0.2, 6)
        result = kill_host_and_go_on(url, sshd, tmp_path / str(number), lambda at=at: time.monotonic() > at)
        check(result, sshd, interruptions=result["interruptions"])


@pytest.mark.slow
def test_launches_of_another_engine_are_not_taken_for_ours(url, sshd, tmp_path, monkeypatch):
    monkeypatch.setattr(ssh, "RECONNECT_S", 0.0)
    stopper = after_launches(sshd, 1, sshd.stop)
    with pytest.raises(ConnectionLost):
        measure(url, tmp_path / "host")
    stopper.join()
    sshd.start()
    assert measure(url, tmp_path / "other", seed=1)["interruptions"] == 0
    left = jobs(sshd)
    assert len(left) == 1  # the interrupted one: for an hour it can be gone on with
    launch = json.loads((left[0] / "launch_0.json").read_text())
    (left[0] / "launch_0.json").write_text(json.dumps(launch | {"spec_sha256": "0" * 64}))
    check(measure(url, tmp_path / "host"), sshd, interruptions=0)


FULL = (
    r"the disk is full: 0\.\d MB free, about \d+\.\d MB needed, in {}",
    "free some space there{}, and run it again: what was measured is kept for an hour",
)
OURS = " (what edgekd keeps of earlier runs: rm -r ~/.edgekd/files)"


def test_a_disk_that_is_too_small_for_what_is_measured(tmp_path):
    with small_disk.mounted(tmp_path / "host/jobs", "200k") as disk:
        with pytest.raises(DiskFull) as caught:
            measure("local:", tmp_path / "host")
        (job,) = (disk.folder / "jobs").iterdir()
        finished = len(list(job.glob("launch_*.json")))
        disk.resize("10m")
        result = measure("local:", tmp_path / "host")
    assert re.fullmatch('benchmark on "local:": ' + FULL[0].format(job), caught.value.what)
    assert caught.value.fix == FULL[1].format("")
    assert result["interruptions"] == (finished > 0)


def test_a_board_whose_disk_is_filled_meanwhile_keeps_what_was_measured(url, sshd, tmp_path):
    with small_disk.mounted(sshd.home / ".edgekd", "20m") as disk:
        other = after_launches(sshd, 1, disk.fill)
        try:
            with pytest.raises(DiskFull) as caught:
                measure(url, tmp_path / "host")
        finally:
            other.join()
        (job,) = jobs(sshd)
        assert finished_launches(sshd)
        disk.empty()
        check(measure(url, tmp_path / "host"), sshd, interruptions=1)
    assert re.fullmatch(f'benchmark on "{re.escape(url)}": ' + FULL[0].format(job), caught.value.what)
    assert caught.value.fix == FULL[1].format(OURS)


def test_a_board_without_numpy_says_how_to_install_it(sshd, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    url = sshd.url(python=str(tmp_path / "bare/bin/python"))
    with pytest.raises(StageError) as caught:
        measure(url, tmp_path / "host")
    assert caught.value.what == f'benchmark on "{url}": numpy is not installed for {tmp_path}/bare/bin/python'
    assert caught.value.fix == (
        f"edgekd doctor --device '{url}' --backend null --install,"
        f" and then: --device '{url.replace(f'&python={tmp_path}/bare/bin/python', '')}'"
    )


@pytest.mark.parametrize("install", ["", " --install"], ids=["here", "there"])
def test_a_board_without_the_runtime_says_how_to_install_it(sshd, tmp_path, monkeypatch, install):
    (tmp_path / "own.py").write_text("import no_such_runtime\n")
    monkeypatch.setattr(Null, "runner", tmp_path / "own.py")
    url = sshd.url(python=sys.executable) if install else "local:"
    with pytest.raises(StageError) as caught:
        measure(url, tmp_path / "host")
    assert "a: ModuleNotFoundError: No module named 'no_such_runtime'" in caught.value.what.replace("student", "a")
    then = f", and then: --device '{sshd.url()}'" if install else ""
    assert caught.value.fix == f"edgekd doctor --device {shlex.quote(url)} --backend null{install}{then}"
