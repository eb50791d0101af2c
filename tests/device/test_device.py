"""What every transport must do, tried on all that the registry knows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_disk
from waiting import wait_until

from edgekd import registry
from edgekd.device import Device
from edgekd.device.porter import processes_in
from edgekd.errors import DiskFull, RecipeError, StageError

# A kit answers with what was recorded; it has tests of its own.
TRANSPORTS = [name for name in registry.names("transport") if name != "kit"]


@pytest.fixture(scope="module", params=TRANSPORTS)
def url(request):
    """This machine, by each transport: what is on the device can be looked at here."""
    if request.param == "local":
        return f"local:?python={sys.executable}"
    assert request.param == "ssh", "a new transport needs a device for its tests"
    return request.getfixturevalue("shared_sshd").url(python=sys.executable)


@pytest.fixture(scope="module")
def device(url, tmp_path_factory):
    return Device(url, tmp_path_factory.mktemp("work"))


@pytest.fixture
def job(device):
    with device.job() as opened:
        yield opened


def test_an_unknown_scheme_lists_the_known_ones(tmp_path):
    with pytest.raises(RecipeError) as caught:
        Device("locl:", tmp_path)
    lines = str(caught.value).split("\n")
    assert lines[0] == """error: device 'locl:': its scheme = "locl" is not a known transport"""
    assert "local" in lines[1]
    assert "closest: " in lines[1]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_unknown_option_in_the_url_lists_the_known_ones(transport, tmp_path):
    with pytest.raises(RecipeError, match="pyton is not a known key or option") as caught:
        Device(f"{transport}:?pyton=/usr/bin/python3", tmp_path)
    assert caught.value.what.startswith(f"device '{transport}:?pyton=/usr/bin/python3': pyton is not")
    assert 'closest: "python"' in caught.value.allowed
    assert (caught.value.fix, caught.value.key) == ("write python, or see: edgekd list transports", "")


def test_a_local_url_names_no_other_machine(tmp_path):
    with pytest.raises(RecipeError, match="'local:board' names no machine"):
        Device("local:board", tmp_path)


def test_files_and_folders_come_back_as_they_went(job, tmp_path):
    content = bytes(range(256)) * 100
    (tmp_path / "tree/deep").mkdir(parents=True)
    (tmp_path / "tree/deep/a file").write_bytes(content)
    (tmp_path / "tree/empty").touch()
    job.put({"sent/tree; it's": tmp_path / "tree"})
    job.put({"single": tmp_path / "tree/deep/a file"})
    job.put({"single": tmp_path / "tree/deep/a file"})
    for name in ("sent/tree; it's/deep/a file", "single"):
        job.get(name, tmp_path / "back", limit_bytes=len(content))
        assert (tmp_path / "back").read_bytes() == content
    job.get("sent/tree; it's/empty", tmp_path / "back", limit_bytes=0)
    assert (tmp_path / "back").read_bytes() == b""


def test_a_full_disk_of_this_machine(tmp_path):
    (tmp_path / "engine").write_bytes(bytes(2_000_000))
    (tmp_path / "other").write_bytes(bytes(500_000))
    with small_disk.mounted(tmp_path / "work", "1m") as disk:
        device = Device("local:", disk.folder)
        with pytest.raises(DiskFull) as caught, device.job("put") as job:
            job.put({"other": tmp_path / "other", "engine": tmp_path / "engine"})
        disk.resize("5m")
        with device.job("put") as job:
            job.put({"other": tmp_path / "other", "engine": tmp_path / "engine"})
            assert (Path(job.folder) / "engine").stat().st_size == 2_000_000
    assert caught.value.what == 'device "local:": its disk is full: 0.0 MB free, 2.0 MB needed'
    assert caught.value.allowed == f"below {disk.folder}/jobs/job-put"
    assert caught.value.fix == "free some space there, and run it again: what was measured is kept for an hour"


def test_what_was_put_is_a_copy(job, tmp_path):
    source = tmp_path / "source"
    source.write_text("kept")
    for _ in range(2):
        job.put({"copy": source})
        assert (Path(job.folder) / "copy").read_text() == "kept"
        job.run(["sh", "-c", "echo spoiled > copy"], timeout=60)
    assert source.read_text() == "kept"


def test_each_job_has_a_folder_of_its_own_that_goes_with_it(device):
    with device.job() as first, device.job() as second:
        assert first.folder != second.folder
        assert Path(first.folder).is_dir()
        assert list(Path(first.folder).iterdir()) == []
        assert Path(first.folder).stat().st_mode & 0o077 == 0
    assert not Path(first.folder).exists()


def test_a_named_job_finds_what_an_interrupted_one_left(device):
    folder = Path(device.transport.make_folder("b7"))
    (folder / "launch").write_text("measured")
    with device.job("b7") as job:
        assert job.folder == str(folder)
        assert (folder / "launch").read_text() == "measured"
    assert not folder.exists()


def test_a_named_job_keeps_off_a_folder_in_which_another_works(device):
    folder = device.transport.make_folder("b8")
    with subprocess.Popen(["sleep", "100"], cwd=folder) as busy:
        with device.job("b8") as job:
            assert job.folder != folder
        assert busy.poll() is None
        device.transport.remove_folder(folder)
        assert busy.wait(10) == -signal.SIGKILL
    assert not Path(folder).exists()


def test_folders_that_a_killed_host_left_are_cleaned_up_by_the_next_job(device):
    old, new = (Path(device.transport.make_folder()) for _ in range(2))
    os.utime(old, (0, time.time() - 7200))
    with device.job():
        assert not old.exists()
        assert new.exists()
    device.transport.remove_folder(str(new))


def test_get_refuses_what_is_absent_too_large_or_a_link(job, tmp_path):
    job.run(["sh", "-c", "echo 123456789 > large; ln -s /etc/hostname link; mkdir folder"], timeout=60)
    refusals = (
        ("absent", "absent was not written"),
        ("large", "large .* 10 bytes"),
        ("link", "link was not"),
        ("folder", "folder was not"),
    )
    for name, text in refusals:
        with pytest.raises(StageError, match=text):
            job.get(name, tmp_path / "back", limit_bytes=9)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_names_stay_in_the_folder(job, tmp_path, name):
    with pytest.raises(ValueError, match="not a path inside the job's folder"):
        job.put({name: tmp_path})
    with pytest.raises(ValueError, match="not a path inside the job's folder"):
        job.get(name, tmp_path / "back", limit_bytes=1)


def test_run_gives_status_output_and_lines_as_they_come(job):
    seen = []
    finished = job.run(
        ["sh", "-c", "pwd; echo one >&2; echo two >&2; exit 3"],
        timeout=60,
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


def test_a_command_that_is_killed_is_no_lost_connection(job):
    finished = job.run(["sh", "-c", "kill -9 $$"], timeout=60)
    with pytest.raises(StageError, match=r"^error: the command failed \(signal SIGKILL\)"):
        finished.check("the command")


def test_every_exit_status_arrives(job):
    assert [job.run(["sh", "-c", f"exit {status}"], timeout=60).status for status in (0, 1, 127, 255)] == [
        0,
        1,
        127,
        255,
    ]


def test_arguments_are_not_read_by_a_shell(job):
    awkward = "a b; $(touch pwned) 'quoted' \"*\" \n !! é"
    finished = job.run([sys.executable, "-c", "import sys; print(repr(sys.argv[1]))", awkward], timeout=60)
    assert finished.stdout == repr(awkward) + "\n"


def test_a_time_out_ends_the_children_too(job):
    started = time.monotonic()
    with pytest.raises(StageError, match=r"^error: sh -c sleep 100 .* did not end within 1 s"):
        job.run(["sh", "-c", "sleep 100 & trap '' TERM; echo stuck >&2; sleep 100"], timeout=1)
    assert time.monotonic() - started < 40
    assert wait_until(lambda: not processes_in(job.folder))


INTERRUPTED = """
import os, signal, sys, threading
from pathlib import Path
from edgekd.device import Device
with Device(sys.argv[1], Path(sys.argv[2])).job() as job:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    print(job.folder, flush=True)
    job.run(["sh", "-c", "sleep 100 & setsid sleep 100"], timeout=100)
"""


def test_an_error_of_ours_ends_the_process(url, tmp_path):
    # What Ctrl-C does: an exception in the middle of the wait.
    finished = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, url, tmp_path],
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    folder = finished.stdout.strip()
    assert "KeyboardInterrupt" in finished.stderr
    assert folder
    assert not processes_in(folder)
    assert not Path(folder).exists()


def test_an_error_while_a_line_is_handled_ends_the_process(job):
    def fail(line):
        raise ZeroDivisionError(line)

    with pytest.raises(ZeroDivisionError, match="first"):
        job.run(["sh", "-c", "echo first >&2; sleep 100"], timeout=100, on_stderr_line=fail)
    assert wait_until(lambda: not processes_in(job.folder))


def test_a_grandchild_that_keeps_the_pipes_does_not_keep_us(job):
    started = time.monotonic()
    finished = job.run(["sh", "-c", "setsid sleep 90 & echo last >&2; exit 4"], timeout=100)
    assert (finished.status, finished.stderr_tail) == (4, ("last",))
    assert time.monotonic() - started < 60


def test_output_without_end_does_not_fill_our_memory(job):
    endless = "import sys\nfor _ in range(400): sys.stdout.write('x' * 100_000); sys.stderr.write('y' * 100_000)"
    finished = job.run([sys.executable, "-c", endless], timeout=60)
    assert finished.status == 0
    assert len(finished.stdout) <= (16 << 20) + 1
    assert sum(map(len, finished.stderr_tail)) <= 30 * (1 << 16)


def test_facts_are_found_on_the_device(device):
    facts = device.facts()
    assert facts["cores"] == os.cpu_count()
    assert facts["kernel"] == os.uname().release
    assert facts["memory_bytes"] > 1 << 20
    assert {"model", "cpu", "os", "python", "numpy", "virtual", "governors", "max_clock_hz"} <= set(facts)
    assert {"load_average", "clock_hz", "temperature_c"} <= set(facts["now"])


def test_a_device_without_a_working_python_is_a_clear_error(tmp_path):
    with pytest.raises(StageError, match="/nowhere/python cannot be run: No such file"):
        Device("local:", tmp_path, {"python": "/nowhere/python"}).facts()


def test_a_device_whose_facts_are_of_other_types_is_a_clear_error(tmp_path):
    liar = tmp_path / "python"
    liar.write_text(f"""#!/bin/sh
{sys.executable} "$@" | sed 's/"cores": [0-9]*/"cores": "many"/'
""")
    liar.chmod(0o755)
    with pytest.raises(StageError) as caught:
        Device("local:", tmp_path, {"python": str(liar)}).facts()
    assert str(caught.value).splitlines() == [
        'error: the facts of local:: not what the agent writes: cores = "many"',
        "       expected: it should be a valid integer",
        "fix:   run it again, and see whether anything else answers there in the place of edgekd's agent",
    ]
