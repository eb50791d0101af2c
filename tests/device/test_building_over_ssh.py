"""Engines that are built on a board over a real ssh server, with stand-ins for TensorRT and CUDA."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import private_sshd
import pytest
import small_disk
import tensorrt_stand_in
from private_sshd import kill
from tiny_job import make_job
from waiting import wait_until

from edgekd import stages
from edgekd.artifact import Artifact, sha256_of
from edgekd.device import ssh
from edgekd.device.porter import processes_in
from edgekd.errors import ConnectionLost, DiskFull, StageError

pytestmark = pytest.mark.skipif(bool(tensorrt_stand_in.missing()), reason=tensorrt_stand_in.missing())


@pytest.fixture
def board(tmp_path):
    return tensorrt_stand_in.Board(tmp_path / "board")


@pytest.fixture
def url(sshd, board):
    return sshd.url(python=str(board.python))


def build_on(url, folder):
    """What the stage makes on a board; the same folder gives the same job."""
    if not (folder / "bundle").exists():
        tensorrt_stand_in.bundle(folder / "bundle")
    digest = sha256_of(folder / "bundle" / stages.ENGINE / "model.onnx")
    bundle = Artifact(folder / "bundle", {"stage": "engine-student", "digest": digest})
    job = make_job(folder / "store", target="jetson")
    job.device = url
    out, work = (Path(tempfile.mkdtemp(dir=folder)) for _ in range(2))
    return stages.build("student", job, {"engine-student": bundle}, out, work)


@pytest.fixture
def build(url, tmp_path):
    return lambda: build_on(url, tmp_path)


def running(sshd):
    return [pid for job in (sshd.home / ".edgekd/jobs").glob("job-*") for pid in processes_in(str(job))]


def test_an_engine_is_built_over_ssh(sshd, build):
    made = build()
    assert (made["evidence"], made["identity"]["device"], made["reused"]) == ("built_on_device", "Stand-in", False)
    assert not running(sshd) and not list((sshd.home / ".edgekd/jobs").glob("job-*"))


def restart(sshd):
    """As when the power fails: the server goes and takes everything along that runs in a job."""
    sshd.stop()
    kill(running(sshd))
    sshd.start()


@pytest.mark.parametrize("fault", [private_sshd.Sshd.cut, restart], ids=["cut", "restart"])
def test_a_build_that_a_lost_connection_or_a_restart_interrupts_is_made_again(sshd, board, build, fault):
    board.fails_by("slow")

    def disturb():
        assert wait_until(lambda: board.builds == 1)
        fault(sshd)
        assert wait_until(lambda: board.builds == 2)
        board.fails_by("")

    thread = threading.Thread(target=disturb)
    thread.start()
    made = build()
    thread.join()
    assert made["evidence"] == "built_on_device" and board.builds == 2
    assert not running(sshd)


def test_a_board_that_does_not_come_back_to_its_build_is_a_clear_error(sshd, board, build, monkeypatch):
    monkeypatch.setattr(ssh, "RECONNECT_S", 0.3)
    board.fails_by("slow")
    thread = threading.Thread(target=lambda: (wait_until(lambda: board.builds == 1), sshd.stop()))
    thread.start()
    with pytest.raises(ConnectionLost, match="the connection was lost"):
        build()
    thread.join()
    assert wait_until(lambda: not running(sshd))
    board.fails_by("")
    sshd.start()
    assert build()["evidence"] == "built_on_device"


HOST = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from test_building_over_ssh import build_on
build_on(sys.argv[3], Path(sys.argv[4]))
"""


def test_a_host_that_is_killed_while_the_board_builds_leaves_nothing_running_there(sshd, board, url, build, tmp_path):
    board.fails_by("slow")
    here = Path(__file__).parent
    argv = [sys.executable, "-c", HOST, str(here), str(here.parent), url, str(tmp_path)]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as host:
        assert wait_until(lambda: board.builds == 1)
        host.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not running(sshd))
    board.fails_by("")
    assert build()["evidence"] == "built_on_device"
    assert not list((sshd.home / ".edgekd/jobs").glob("job-*"))


def test_a_board_whose_disk_fills_up_over_ssh(sshd, board, url, build):
    """The engine is larger than the disk; when there is space, the next build goes on with what was sent."""
    board.fails_by("large")
    with small_disk.mounted(sshd.home / ".edgekd", "10m") as disk:
        with pytest.raises(DiskFull) as caught:
            build()
        (job,) = (sshd.home / ".edgekd/jobs").iterdir()
        assert not list(job.glob("model.plan*")) and not (job / "build.json").exists() and not running(sshd)
        board.fails_by("")
        disk.resize("20m")
        assert build()["evidence"] == "built_on_device"
    assert re.fullmatch(
        rf'no engine of the student on "{re.escape(url)}": No space left on device: '
        rf"\d+\.\d MB free, 21\.0 MB needed: {job}/model\.plan",
        caught.value.what,
    )
    assert caught.value.fix == (
        "free some space there (what edgekd keeps of earlier runs: rm -r ~/.edgekd/files), and run it again: what was"
        " measured is kept for an hour"
    )


def test_a_board_that_runs_out_of_memory_over_ssh(sshd, board, build):
    board.fails_by("killed")
    with pytest.raises(StageError, match=r"its build was killed \(signal 9\), as happens when memory runs out"):
        build()
    assert not running(sshd)
