"""A compiler in a process of its own: what it leaves, and how it ends."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from edgekd.backends import child
from edgekd.errors import StageError


def program(*lines):
    return [sys.executable, "-c", "\n".join(("import os, pathlib, signal, sys", *lines))]


def result_of(argv, folder, **options):
    options = {"what": "cc, compiling m.onnx", "fix": "another form", "timeout": 60.0, **options}
    return child.result_of(argv, folder / "result.json", **options)


def test_the_result_is_what_the_program_wrote_where_it_was_told_to_be(tmp_path):
    write = "pathlib.Path('result.json').write_text('{\"word\": \"%s\"}' % os.environ['WORD'])"
    argv = program(write, "print('said')", "sys.exit(1)")
    log = tmp_path / "log"
    found = result_of(argv, tmp_path, cwd=tmp_path, environment={"WORD": "yes"}, expected=(0, 1), log=log)
    assert found == {"word": "yes"} and log.read_text() == "said\n"
    assert "WORD" not in os.environ


@pytest.mark.parametrize(
    ("line", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "it crashed (SIGSEGV)"),
        ("sys.exit(3)", "it ended with exit status 3"),
        ("pass", "it ended without a result"),
    ],
)
def test_how_it_ended_is_said_with_its_last_lines(tmp_path, line, how):
    with pytest.raises(StageError) as caught:
        result_of(program("print('before', flush=True)", line), tmp_path, log=tmp_path / "log")
    assert str(caught.value) == (
        f"error: cc, compiling m.onnx: {how}\n       its last lines:\n         before\n"
        f"       all of them: {tmp_path / 'log'}\nfix:   another form"
    )


def test_on_a_full_disk_the_model_is_not_to_blame(tmp_path):
    line = "sys.exit('ld: final link failed: No space left on device')"
    with pytest.raises(StageError) as caught:
        result_of(program(line), tmp_path)
    assert caught.value.fix == "free some space, then run again: what is finished is kept"


def test_one_that_hangs_is_ended_with_its_children(tmp_path):
    lines = [
        "import subprocess, time",
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)",
        "time.sleep(600)",
    ]
    assert child.ended(program(*lines), tmp_path / "log", 5) == "did not end within 5 s"
    said = (tmp_path / "log").read_text()
    command = Path(f"/proc/{said.strip() or 'none'}/cmdline")  # empty once it is dead, and soon gone
    deadline = time.monotonic() + 60
    while command.exists() and command.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline
