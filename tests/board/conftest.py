"""A stand-in board: emulated aarch64 with its own address, disk, sensors and ssh server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import board_files
import pytest

HERE = Path(__file__).parent
CACHE = Path("/var/cache/edgekd-board")
ADDRESS = "10.77.0.2"
CLIENT = """\
Host board
  HostName {address}
  User pi
  IdentityFile {state}/key
  IdentitiesOnly yes
  UserKnownHostsFile {state}/known_hosts
"""


class Board:
    """A board that is switched on."""

    def __init__(self, state: Path) -> None:
        self.state, self.kernel = state, board_files.write(state / "kernel", board_files.RASPBERRY_PI_5)
        for name in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", state / name], check=True)
        kind, key = (state / "host_key.pub").read_text().split()[:2]
        (state / "known_hosts").write_text(f"{ADDRESS} {kind} {key}\n")
        (state / "config").write_text(CLIENT.format(address=ADDRESS, state=state))
        self.url = f"ssh://board?config={state}/config"
        self.power("on")

    def power(self, *arguments: object) -> None:
        """What tests/board/power can do to it."""
        do, *rest = map(str, arguments)
        argv = [HERE / "power", do, self.state, *rest]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"power {do}: {done.stderr}"

    def home(self) -> Path:
        """What has been written to its home folder, seen from here."""
        return self.state / "disk/upper/home/pi"


def why_not() -> str:
    if os.getuid() != 0:
        return "a stand-in board needs root: it runs in namespaces of its own"
    made = subprocess.run(
        [HERE / "make", CACHE],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return f"tests/board/make failed: {made.stderr.strip()[-300:]}" if made.returncode else ""


@pytest.fixture(scope="session")
def shared_board(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    state = tmp_path_factory.mktemp("board")
    try:
        yield Board(state)
    finally:
        subprocess.run([HERE / "power", "off", state], capture_output=True, check=False)


@pytest.fixture
def board(shared_board):
    """The board as it was when new, but for what is kept in its home."""
    yield shared_board
    for do in ("heal", "empty", "back"):
        shared_board.power(do)
    board_files.write(shared_board.kernel, board_files.RASPBERRY_PI_5)
