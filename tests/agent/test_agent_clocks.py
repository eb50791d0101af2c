"""Clocks are locked in files, and put back however the agent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import board_files
import pytest

from edgekd.agent.clocks import Locked, wanted
from edgekd.agent.errors import AgentError
from edgekd.device import AGENT

FILES = board_files.JETSON_ORIN_NANO
POLICY = f"{board_files.CPUFREQ}policy0/"
LOCKED = {
    f"{POLICY}scaling_governor": "performance",
    f"{POLICY}scaling_min_freq": "1510400",
    f"{POLICY}scaling_max_freq": "1510400",
    f"{board_files.GPU}min_freq": "1020000000",
}
HOLDER = """
import sys, time
from agent.clocks import Locked
Locked(sys.argv[1])
print("locked", flush=True)
time.sleep(100)
"""


@pytest.fixture
def root(tmp_path):
    return board_files.write(tmp_path, FILES)


def contents(root):
    return {name: (root / name).read_text().strip() for name in LOCKED}


def as_they_were():
    return {name: FILES[name].strip() for name in LOCKED}


def test_clocks_are_locked_and_put_back(root):
    locked = Locked(str(root))
    assert contents(root) == LOCKED
    locked.close()
    assert contents(root) == as_they_were()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_they_are_put_back_when_the_agent_is_killed(root, number):
    argv = [sys.executable, "-c", HOLDER, str(root)]
    with subprocess.Popen(argv, cwd=AGENT.parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdout.readline() == b"locked\n"
        assert contents(root) == LOCKED
        os.kill(holder.pid, number)
    deadline = time.monotonic() + 10
    while contents(root) != as_they_were() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert contents(root) == as_they_were()


def test_a_machine_without_such_files_says_so(tmp_path):
    with pytest.raises(AgentError) as caught:
        Locked(str(tmp_path))
    assert str(caught.value) == "the clocks cannot be locked: the kernel of this machine has no files for them"


def test_who_may_not_write_them_is_told(root):
    if os.getuid() == 0:
        # Root may write anything but a folder.
        (root / f"{POLICY}scaling_governor").unlink()
        (root / f"{POLICY}scaling_governor").mkdir()
        reason = "Is a directory"
    else:
        (root / f"{POLICY}scaling_governor").chmod(0o444)
        reason = "only root may"
    with pytest.raises(AgentError) as caught:
        Locked(str(root))
    assert str(caught.value) == f"the clocks cannot be locked: {root}/{POLICY}scaling_governor: {reason}"
    assert (root / f"{POLICY}scaling_max_freq").read_text().strip() == "1510400"


def test_the_upper_limit_is_written_before_the_lower(root):
    names = [file.rpartition("/")[2] for file in wanted(str(root)) if "policy0" in file]
    assert names == ["scaling_governor", "scaling_max_freq", "scaling_min_freq"]
