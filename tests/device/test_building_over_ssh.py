"""Engines that are built on a board over a real ssh server, with stand-ins for TensorRT and CUDA."""

from __future__ import annotations

import threading
import time

import pytest
import tensorrt_stand_in
from tiny_job import make_job

from edgekd import stages
from edgekd.device.porter import processes_in
from edgekd.errors import StageError

pytestmark = pytest.mark.skipif(bool(tensorrt_stand_in.missing()), reason=tensorrt_stand_in.missing())


@pytest.fixture
def board(tmp_path):
    return tensorrt_stand_in.Board(tmp_path / "board")


@pytest.fixture
def build(sshd, board, tmp_path):
    bundle = tensorrt_stand_in.bundle(tmp_path / "bundle")
    job = make_job(tmp_path / "store", target="jetson")
    job.device = sshd.url(python=str(board.python))
    counted = iter(range(100))

    def run():
        out, work = (tmp_path / f"{name}-{next(counted)}" for name in ("out", "work"))
        out.mkdir()
        work.mkdir()
        return stages.build("student", job, {"engine-student": bundle}, out, work)

    return run


def running(sshd):
    return [pid for job in (sshd.home / ".edgekd/jobs").glob("job-*") for pid in processes_in(str(job))]


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_an_engine_is_built_over_ssh(sshd, build):
    made = build()
    assert (made["evidence"], made["identity"]["device"], made["reused"]) == ("built_on_device", "Stand-in", False)
    assert not running(sshd) and not list((sshd.home / ".edgekd/jobs").glob("job-*"))


def test_a_build_whose_connection_is_lost_is_made_again(sshd, board, build):
    board.fails_by("slow")

    def disturb():
        wait_until(lambda: board.builds == 1)
        sshd.cut()
        wait_until(lambda: board.builds == 2)
        board.fails_by("")

    thread = threading.Thread(target=disturb)
    thread.start()
    made = build()
    thread.join()
    assert made["evidence"] == "built_on_device" and board.builds == 2
    assert not running(sshd)


def test_a_board_that_runs_out_of_memory_over_ssh(sshd, board, build):
    board.fails_by("killed")
    with pytest.raises(StageError, match=r"its build was killed \(signal 9\), as happens when memory runs out"):
        build()
    assert not running(sshd)
