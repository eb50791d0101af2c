"""What every transport must do, tried on `local:`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgekd.device import Device, parsed
from edgekd.errors import RecipeError, StageError


def processes_in(folder):
    """The processes that run below a folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if str(link.readlink()).startswith(str(folder)):
                found.append(link.parent.name)
        except OSError:
            pass  # it ended while we looked, or is not ours
    return found


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def device(tmp_path):
    return Device("local:", tmp_path)


@pytest.fixture
def job(device):
    with device.job() as opened:
        yield opened


def test_an_unknown_scheme_lists_the_known_ones(tmp_path):
    with pytest.raises(RecipeError) as caught:
        Device("locl:", tmp_path)
    lines = str(caught.value).split("\n")
    assert lines[0] == """error: the scheme of device 'locl:' = "locl" is not a known transport"""
    assert "local" in lines[1]
    assert "closest: " in lines[1]


def test_a_local_url_names_no_other_machine(tmp_path):
    with pytest.raises(RecipeError, match="'local:board' names no machine"):
        Device("local:board", tmp_path)


def test_files_and_folders_come_back_as_they_went(job, tmp_path):
    content = bytes(range(256)) * 100
    (tmp_path / "tree/deep").mkdir(parents=True)
    (tmp_path / "tree/deep/a file").write_bytes(content)
    job.put(tmp_path / "tree", "sent/tree")
    job.put(tmp_path / "tree/deep/a file", "single")
    for name in ("sent/tree/deep/a file", "single"):
        job.get(name, tmp_path / "back", limit_bytes=len(content))
        assert (tmp_path / "back").read_bytes() == content


def test_what_was_put_is_a_copy(job, tmp_path):
    source = tmp_path / "source"
    source.write_text("kept")
    job.put(source, "copy")
    job.run(["sh", "-c", "echo spoiled > copy"], timeout=10)
    assert source.read_text() == "kept"


def test_each_job_has_a_folder_of_its_own_that_goes_with_it(device):
    with device.job() as first, device.job() as second:
        assert first.folder != second.folder
        assert Path(first.folder).is_dir()
        assert list(Path(first.folder).iterdir()) == []
    assert not Path(first.folder).exists()


def test_get_refuses_what_is_absent_too_large_or_a_link(job, tmp_path):
    job.run(["sh", "-c", "echo 123456789 > large; ln -s /etc/hostname link"], timeout=10)
    for name, text in (("absent", "absent was not written"), ("large", "large .* 10 bytes"), ("link", "link was not")):
        with pytest.raises(StageError, match=text):
            job.get(name, tmp_path / "back", limit_bytes=9)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_names_stay_in_the_folder(job, tmp_path, name):
    with pytest.raises(ValueError, match="not a path inside the job's folder"):
        job.put(tmp_path, name)
    with pytest.raises(ValueError, match="not a path inside the job's folder"):
        job.get(name, tmp_path / "back", limit_bytes=1)


def test_run_gives_status_output_and_lines_as_they_come(job):
    seen = []
    finished = job.run(
        ["sh", "-c", "pwd; echo one >&2; echo two >&2; exit 3"],
        timeout=10,
        on_stderr_line=seen.append,
    )
    assert (finished.status, finished.stdout) == (3, job.folder + "\n")
    assert seen == ["one", "two"] == list(finished.stderr_tail)
    with pytest.raises(StageError) as caught:
        finished.check("the command")
    assert str(caught.value) == (
        "error: the command failed (exit status 3)\n       its last lines:\n         one\n         two\n"
        "fix:   mend what these lines say, and run it again"
    )


def test_arguments_are_not_read_by_a_shell(job):
    awkward = "a b; $(touch pwned) 'quoted' \"*\" \n"
    finished = job.run([sys.executable, "-c", "import sys; print(repr(sys.argv[1]))", awkward], timeout=10)
    assert finished.stdout == repr(awkward) + "\n"


def test_a_time_out_ends_the_children_too(job):
    started = time.monotonic()
    with pytest.raises(StageError, match=r"did not end within 0\.3 s"):
        job.run(["sh", "-c", "sleep 100 & trap '' TERM; echo stuck >&2; sleep 100"], timeout=0.3)
    assert time.monotonic() - started < 10
    assert wait_until(lambda: not processes_in(job.folder))


def test_an_error_of_ours_ends_the_process(job):
    # What Ctrl-C does: an exception in the middle of the wait.
    script = (
        "import os, signal, sys, threading; from pathlib import Path; from edgekd.device import Device\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "with Device('local:', Path(sys.argv[1])).job() as job: job.run(['sleep', '100'], timeout=100)"
    )
    folder = Path(job.folder)
    finished = subprocess.run(
        [sys.executable, "-c", script, folder],
        capture_output=True,
        text=True,
        timeout=30,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    assert "KeyboardInterrupt" in finished.stderr
    assert not processes_in(folder)
    assert list(folder.iterdir()) == []


def test_an_error_while_a_line_is_handled_ends_the_process(job):
    def fail(line):
        raise ZeroDivisionError(line)

    with pytest.raises(ZeroDivisionError, match="first"):
        job.run(["sh", "-c", "echo first >&2; sleep 100"], timeout=100, on_stderr_line=fail)
    assert wait_until(lambda: not processes_in(job.folder))


def test_a_grandchild_that_keeps_the_pipes_does_not_keep_us(job):
    started = time.monotonic()
    finished = job.run(["sh", "-c", "setsid sleep 20 & echo last >&2; exit 4"], timeout=100)
    assert (finished.status, finished.stderr_tail) == (4, ("last",))
    assert time.monotonic() - started < 15


def test_output_without_end_does_not_fill_our_memory(job):
    endless = "import sys\nfor _ in range(400): sys.stdout.write('x' * 100_000); sys.stderr.write('y' * 100_000)"
    finished = job.run([sys.executable, "-c", endless], timeout=60)
    assert finished.status == 0
    assert len(finished.stdout) <= (16 << 20) + 1
    assert sum(map(len, finished.stderr_tail)) <= 30 * (1 << 16)


def test_facts_are_found_on_the_device(device, tmp_path):
    facts = device.facts()
    assert facts["cores"] == os.cpu_count()
    assert facts["kernel"] == os.uname().release
    assert facts["memory_bytes"] > 1 << 20
    assert {"model", "cpu", "os", "python", "numpy", "virtual", "governors", "max_clock_hz"} <= set(facts)
    assert {"load_average", "clock_hz", "temperature_c"} == set(facts["now"])
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_a_working_python_is_a_clear_error(tmp_path):
    with pytest.raises(StageError, match="/nowhere/python cannot be run: No such file"):
        Device("local:", tmp_path, {"python": "/nowhere/python"}).facts()


@pytest.mark.parametrize(
    ("text", "why"),
    [("{", "Expecting"), ("[]", "a JSON list"), ("[" * 100_000, "recursion"), (" " * ((16 << 20) + 1), "at most")],
)
def test_only_a_json_object_of_sane_size_is_parsed(text, why):
    with pytest.raises(StageError, match=f"(?s)facts: not what the agent writes: .*{why}"):
        parsed(text, "facts")
