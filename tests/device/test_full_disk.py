"""A board's disk that is full, over ssh."""

from __future__ import annotations

import logging
import os
import re
import threading
from pathlib import Path

import pytest
import small_disk
from waiting import wait_until

from edgekd.device import porter
from edgekd.errors import DiskFull

FULL = "free some space there (what edgekd keeps of earlier runs: rm -r ~/.edgekd/files), and run it again: what was"
FULL += " measured is kept for an hour"


def test_a_disk_that_is_too_small_for_what_is_sent(sshd, device, tmp_path):
    (tmp_path / "engine").write_bytes(bytes(2_000_000))
    with small_disk.mounted(sshd.home / ".edgekd", "3m") as disk:
        with pytest.raises(DiskFull) as caught, device.job("sent") as job:
            job.put({"engine": tmp_path / "engine"})
        assert Path(job.folder).exists()  # what an earlier run has measured in there is not lost
        disk.resize("10m")
        with device.job("sent") as job:
            job.put({"engine": tmp_path / "engine"})
    assert caught.value.what == 'device "ssh://board": its disk is full: 3.1 MB free, 4.0 MB needed'
    assert (caught.value.allowed, caught.value.fix) == (f"below {sshd.home}/.edgekd", FULL)


def test_a_disk_that_is_filled_while_something_is_sent(sshd, device, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    size = 60_000_000
    (tmp_path / "engine").write_bytes(os.urandom(size))
    files = sshd.home / ".edgekd/files"

    def arrived():
        return sum(part.stat().st_size for part in files.glob("*.part")) > size // 10

    with small_disk.mounted(sshd.home / ".edgekd", "150m") as disk:
        other = threading.Thread(target=lambda: wait_until(arrived) and disk.fill())
        other.start()
        try:
            with pytest.raises(DiskFull) as caught, device.job("sent") as job:
                job.put({"engine": tmp_path / "engine"})
        finally:
            other.join()
        assert not (Path(job.folder) / "engine").exists() or (Path(job.folder) / "engine").stat().st_size < size
        disk.empty()
        with device.job("sent") as job:
            job.put({"engine": tmp_path / "engine"})
            assert (Path(job.folder) / "engine").read_bytes() == (tmp_path / "engine").read_bytes()
    free, needed = re.search(r"its disk is full: ([\d.]+) MB free, ([\d.]+) MB needed", caught.value.what).groups()
    assert float(free) < 1 and 1 < float(needed) < 114  # what had arrived is not needed again
    sent, kept = map(int, re.search(r"(\d+) bytes sent, (\d+) were there", caplog.text).groups())
    assert kept > size // 10 and sent + kept == size


def test_a_disk_with_no_room_at_all(sshd, device):
    with small_disk.mounted(sshd.home / ".edgekd", "1m") as disk:
        disk.fill()
        with pytest.raises(DiskFull) as caught:
            device.facts()
    assert caught.value.what.startswith('device "ssh://board": its disk is full: 0.0 MB free')
    assert caught.value.fix == FULL


def test_a_disk_on_which_not_even_our_folder_can_be_made(sshd, device):
    with small_disk.mounted(sshd.home, "1m,nr_inodes=1"), pytest.raises(DiskFull) as caught:
        device.facts()
    assert caught.value.what == 'device "ssh://board": its disk is full: 1.0 MB free'
    assert caught.value.allowed == f"below {sshd.home}/.edgekd"


def test_a_disk_without_room_for_who_has_the_board(sshd, device):
    temporary = sshd.folder / "tmp"
    with small_disk.mounted(temporary, "1m") as disk:
        disk.fill()
        with pytest.raises(DiskFull) as caught, device.reserved(pytest.fail):
            pass
        assert device.transport.holder() == {}
        disk.empty()
        with device.reserved(pytest.fail):
            assert (temporary / "edgekd.lock").exists() and device.transport.holder()["user"]
    assert caught.value.what == 'device "ssh://board": its disk is full: 0.0 MB free'
    assert caught.value.allowed == f"below {temporary}"


def test_the_lock_of_a_board_is_in_the_temporary_folder(tmp_path, monkeypatch):
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    assert porter.device_lock() == "/tmp/edgekd.lock"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert porter.device_lock() == f"{tmp_path}/edgekd.lock"
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    assert porter.device_lock() == "/tmp/edgekd.lock"
