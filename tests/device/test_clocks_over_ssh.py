"""Clocks that were locked on a remote board are put back when its host dies."""

from __future__ import annotations

import shutil
import signal
import sys

import board_files
from test_interruptions import jobs, processes_in, start_host, wait_until

# An interpreter whose agent finds the kernel's files of another machine below a folder.
ELSEWHERE = """#!/bin/sh
case "$2" in *stdin.read*) echo '["{own}", [3, 11, 0], "{home}"]'; exec cat;; esac
case "$*" in *"agent bench"*) exec {python} "$@" --root {root};; esac
exec {python} "$@"
"""


def test_a_killed_host_leaves_no_clock_locked(sshd, tmp_path):
    """SIGKILL: nobody on the host can ask for anything; the board's own processes see that it is gone."""
    root = board_files.write(tmp_path / "kernel", board_files.JETSON_ORIN_NANO)
    own = tmp_path / "python"
    own.write_text(ELSEWHERE.format(own=own, home=sshd.home, python=sys.executable, root=root))
    own.chmod(0o755)
    clocks = [root / f"{board_files.CPUFREQ}policy0/scaling_{name}" for name in ("governor", "min_freq")]
    before = [file.read_text().strip() for file in clocks]
    with start_host(sshd.url(python=str(own)), tmp_path / "host", lock_clocks=True) as host:
        assert wait_until(lambda: clocks[0].read_text() == "performance" or host.poll() is not None)
        assert wait_until(lambda: clocks[1].read_text() == "1510400", seconds=5)
        host.send_signal(signal.SIGKILL)
    assert wait_until(lambda: [file.read_text().strip() for file in clocks] == before)
    assert wait_until(lambda: not [pid for job in jobs(sshd) for pid in processes_in(str(job))])
    for job in jobs(sshd):  # kept for an hour, for a run that will not come
        shutil.rmtree(job)
