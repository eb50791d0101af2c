"""One job at a time has a device, and says whose it is, whatever becomes of its host."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import edgekd.device
from edgekd import device as devices
from edgekd import registry
from edgekd.device import BusyError, Device, bootstrap, porter
from edgekd.errors import StageError

HOLD = """
import sys, time
from pathlib import Path
from edgekd.device import Device
with Device(sys.argv[1], Path(sys.argv[2])).reserved(print):
    print("mine", flush=True)
    time.sleep(100)
"""


@pytest.fixture(params=[name for name in registry.names("transport") if name != "kit"])
def url(request):
    if request.param == "local":
        return f"local:?python={sys.executable}"
    return request.getfixturevalue("sshd").url(python=sys.executable)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(devices, "TURN_EVERY_S", 0.05)


@contextlib.contextmanager
def another_host(url, folder):
    argv = [sys.executable, "-c", HOLD, url, str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout.readline() == "mine\n"
        yield host
        host.kill()


def is_free(device):
    try:
        with device.reserved(pytest.fail):
            return True
    except pytest.fail.Exception:
        return False


def test_a_job_waits_for_its_turn_and_says_for_whom(url, tmp_path):
    first, second = Device(url, tmp_path), Device(url, tmp_path)
    told, had = [], []

    def come_second():
        with second.reserved(told.append):
            had.append("second")

    with first.reserved(pytest.fail):
        other = threading.Thread(target=come_second)
        other.start()
        deadline = time.monotonic() + 60
        while not told and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not had
        had.append("first")
        assert first.transport.holder()["user"]
        row = bootstrap.turn(first)
        assert f"waiting: in use {row.found}" == told[0]
        assert row.fix == "wait for it"
    other.join()
    assert had == ["first", "second"]
    assert bootstrap.turn(first).found == "by nobody"
    user = devices.getpass.getuser()
    assert told[0].startswith(f"waiting: in use by {user}@{devices.socket.gethostname()} since 20")


def test_facts_need_no_turn(url, tmp_path):
    with Device(url, tmp_path).reserved(pytest.fail):
        assert Device(url, tmp_path).facts()["python"]


def test_a_killed_host_lets_go(url, tmp_path):
    with another_host(url, tmp_path) as host:
        device = Device(url, tmp_path)
        with pytest.raises(BusyError):
            device.transport.lock({"token": "ours"})
        host.send_signal(signal.SIGKILL)
        host.wait()
        with device.reserved(lambda text: None):
            pass


def test_waiting_ends_with_whose_it_is(url, tmp_path, monkeypatch):
    monkeypatch.setattr(edgekd.device, "TURN_PATIENCE_S", -1.0)
    with another_host(url, tmp_path):
        device = Device(url, tmp_path)
        with pytest.raises(StageError) as caught, device.reserved(pytest.fail):
            pytest.fail("two have it")
        who = devices.text_from_holder(device.transport.holder())
    assert caught.value.what == f'device "{url}" is in use by {who}'
    assert caught.value.allowed.startswith("one job at a time has a device; waited ")
    assert caught.value.fix == "ask whose it is, and run it again"


def test_a_lost_connection_does_not_lose_the_turn(sshd, tmp_path):
    url = sshd.url(python=sys.executable)
    ours, theirs = Device(url, tmp_path), Device(url, tmp_path)
    with ours.reserved(pytest.fail), ours.job() as job:
        sshd.cut()
        assert ours.transport._connection.ends(within_s=60)
        assert job.run(["true"], timeout=60).status == 0
        with pytest.raises(BusyError):
            theirs.transport.lock({"token": "theirs"})
    assert is_free(theirs)


def test_our_own_turn_is_taken_over_though_the_old_connection_seems_to_stand(tmp_path):
    lock = str(tmp_path / "lock")
    code = "import sys; from edgekd.device import porter; porter.take(sys.argv[1], {'token': 'x'}); print(); input()"
    argv = [sys.executable, "-c", code, lock]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as old:
        old.stdout.readline()
        with pytest.raises(porter.RefusedError, match="busy"):
            porter.take(lock, {"token": "y"})
        porter.take(lock, {"token": "x"})
        assert old.wait() == -signal.SIGKILL


def test_a_silent_host_loses_its_turn(tmp_path, monkeypatch):
    code = (
        "import sys; from edgekd.device import porter; porter.SILENCE_S = 0.5\n"
        "porter.hold(sys.argv[1], {'token': 'x'}, sys.stdout.buffer)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert json.loads(holder.stdout.readline()) == {"done": None}
        assert porter.holder(str(tmp_path / "lock"))["token"] == "x"
        assert holder.wait(60) == 0
    assert porter.holder(str(tmp_path / "lock")) == {}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"user": {"a": 1}}', "\x1b[2J"])
def test_what_is_written_in_the_lock_may_be_anything(tmp_path, content):
    lock = tmp_path / "lock"
    lock.write_text(content)
    with lock.open() as file:
        porter.fcntl.flock(file, porter.fcntl.LOCK_EX)
        assert devices.text_from_holder(porter.holder(str(lock))).isprintable()
        with pytest.raises(porter.RefusedError):
            porter.take(str(lock), {"token": ""})
    porter.take(str(lock), {"token": ""})


def test_a_lock_that_was_deleted_is_not_trusted(tmp_path, monkeypatch):
    lock, flock = tmp_path / "lock", porter.fcntl.flock
    calls = []

    def delete_first(descriptor, how):
        flock(descriptor, how)
        if not calls:
            lock.unlink()
        calls.append(how)

    monkeypatch.setattr(porter.fcntl, "flock", delete_first)
    porter.take(str(lock), {"token": "x"})
    assert len(calls) == 2
    assert lock.exists()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        porter.take(str(tmp_path / "lock"), {"token": "x"})
    assert not Path(tmp_path / "victim").exists()
