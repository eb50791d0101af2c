from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from tiny_model import tiny_onnx

pytest.importorskip("tvm", reason="TVM is an extra: pip install 'edgekd[tvm]'")
pytest.importorskip("tornado", reason="TVM's tracker is an extra: pip install 'edgekd[tvm-rpc]'")

from edgekd import registry
from edgekd.errors import StageError


@pytest.fixture
def tracker(tmp_path):
    """HOST:PORT/KEY of TVM's own tracker, which lends one board: a server of its own on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host, name = ["--host", "127.0.0.1"], f"127.0.0.1:{port}"
    places = [
        ["rpc_tracker", *host, "--port", str(port), "--port-end", str(port + 1)],
        ["rpc_server", *host, "--port", str(port + 100), "--port-end", str(port + 200), "--tracker", name,
         "--key", "board"],
    ]  # fmt: skip
    environment = {**os.environ, "TVM_BIND_THREADS": "0"}
    processes = []
    try:
        for module, *arguments in places:
            argv = [sys.executable, "-m", f"tvm.exec.{module}", *arguments]
            with (tmp_path / module).open("wb") as log:
                processes.append(
                    subprocess.Popen(
                        argv, stdout=log, stderr=log, env=environment, cwd=tmp_path, start_new_session=True
                    )
                )
        wait_for_board("127.0.0.1", port, (tmp_path / "rpc_server"))
        yield f"{name}/board"
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_board(host, port, log):
    """TVM's own attempts to connect leave sockets open, so there is one, when somebody listens."""
    from tvm import rpc

    until = time.monotonic() + 120
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
            break
        time.sleep(0.2)
    tracker = rpc.connect_tracker(host, port)
    try:
        while time.monotonic() < until:
            if tracker.summary()["queue_info"].get("board", {}).get("free"):
                return
            time.sleep(0.2)
    finally:
        tracker.close()
    raise AssertionError(f"no board within two minutes: {log.read_text()}")


@pytest.mark.slow
def test_kernels_and_engines_are_timed_on_the_board_that_a_tracker_lends(tmp_path, tracker):
    out = tmp_path / "out"
    out.mkdir()
    backend, told = registry.create("backend", "tvm", options={"tuning": {"trials": 3}, "tracker": tracker}), []
    backend.kept, backend.on_progress = tmp_path / "kept", lambda share, text: told.append(text)
    found = backend.compile(tiny_onnx(tmp_path / "tiny.onnx"), out, threads=1)["tuning"]
    assert found["trials"] >= 3 and found["kept"] in ("tuned", "untuned")
    assert told and "load" in (tmp_path / "rpc_server").read_text().lower()


def test_a_tracker_that_is_not_there_is_told(tmp_path):
    backend = registry.create("backend", "tvm", options={"tuning": "quick", "tracker": "127.0.0.1:1/pi"})
    with pytest.raises(StageError, match=r"the tracker 127\.0\.0\.1:1/pi lends no board: "):
        backend.compile(tiny_onnx(tmp_path / "tiny.onnx"), tmp_path, threads=1)
