from __future__ import annotations

import sys

import private_sshd
import pytest

from edgekd.device import Device


@pytest.fixture(scope="session")
def shared_sshd(tmp_path_factory):
    if reason := private_sshd.missing():
        pytest.skip(reason)
    started = private_sshd.Sshd(tmp_path_factory.mktemp("sshd"))
    yield started
    started.stop()


@pytest.fixture
def sshd(shared_sshd):
    """An ssh server of our own, as it was set up."""
    yield shared_sshd
    shared_sshd.trust(shared_sshd.folder / "host_key.pub")
    if not shared_sshd.process:
        shared_sshd.start()


@pytest.fixture
def device(sshd, tmp_path):
    return Device(sshd.url(python=sys.executable), tmp_path)
