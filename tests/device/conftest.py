from __future__ import annotations

import private_sshd
import pytest


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
