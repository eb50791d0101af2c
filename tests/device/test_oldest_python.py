"""The oldest Python that is here, as a board's: what is sent there must run under 3.8."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from test_interruptions import jobs, measure

from edgekd.device import Device


def oldest():
    """An interpreter older than ours, with numpy; None when there is none."""
    for name in ("python3.8", "python3.9", "python3.10"):
        path = shutil.which(name)
        if path and not subprocess.run([path, "-c", "import numpy"], capture_output=True, check=False).returncode:
            return path
    return None


@pytest.fixture
def url(sshd):
    python = oldest()
    if python is None:
        pytest.skip("no python3.8, python3.9 or python3.10 with numpy on the PATH")
    return sshd.url(python=python)


def test_a_benchmark(url, sshd, tmp_path):
    result = measure(url, tmp_path / "host")
    assert result["device"]["python"].startswith(("3.8.", "3.9.", "3.10."))
    assert result["speedup"]["value"] == pytest.approx(3.0, rel=0.35)
    assert jobs(sshd) == []


def test_turns(url, tmp_path):
    first, second = Device(url, tmp_path), Device(url, tmp_path)
    with first.reserved(pytest.fail):
        assert second.transport.holder()["user"]
    assert second.transport.holder() == {}
