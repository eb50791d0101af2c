"""The ssh transport against a real server on this machine: connections, faults, and what the user is told."""

from __future__ import annotations

import ast
import base64
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import private_sshd
import pytest
from waiting import wait_until

from edgekd.device import Device, openssh, porter, ssh
from edgekd.device.openssh import Address, explained
from edgekd.device.porter import processes_in
from edgekd.errors import ConnectionLost, EdgekdError, MissingError, RecipeError, StageError


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(ssh, "RECONNECT_S", 0.5)
    monkeypatch.setattr(ssh, "RECONNECT_EVERY_S", 0.2)


def failure(url, tmp_path) -> EdgekdError:
    with pytest.raises(EdgekdError) as caught:
        Device(url, tmp_path).facts()
    return caught.value


# ---------------------------------------------------------------- the URL


@pytest.mark.parametrize(
    "url",
    ["ssh:", "ssh://", "ssh://-oProxyCommand=touch%20x", "ssh://-l@board", "ssh://a:secret@board", "ssh://board:port",
     "ssh://board/folder", "ssh://board#x"],
)  # fmt: skip
def test_what_is_no_address_of_a_board_is_refused(url, tmp_path):
    with pytest.raises(RecipeError) as caught:
        Device(url, tmp_path)
    assert caught.value.what.startswith(f"device {url!r} is not valid: ")
    assert "secret" not in caught.value.allowed
    assert caught.value.fix == "as in --device ssh://pi@raspberrypi.local"


def test_the_user_the_port_and_the_case_of_an_alias_reach_ssh(tmp_path):
    argv = Device("ssh://pi@My-Board:2222", tmp_path).transport._connection.argv("true")
    assert argv[-5:] == ["-p", "2222", "--", "pi@My-Board", "true"]


def test_a_device_is_not_spoken_to_before_it_is_used(tmp_path):
    Device("ssh://nobody.invalid", tmp_path)


# ---------------------------------------------------------------- connections


def test_one_login_serves_all_commands(sshd, device):
    logins = (sshd.folder / "log").read_text().count("Accepted publickey")
    with device.job() as job:
        for _ in range(3):
            assert job.run(["true"], timeout=60).status == 0
    assert (sshd.folder / "log").read_text().count("Accepted publickey") == logins + 1


def test_no_command_opens_a_connection_of_its_own(sshd, device):
    assert device.transport.python
    connection = device.transport._connection
    argv = connection.request("holder")
    assert subprocess.run(argv, capture_output=True, timeout=60, check=False).returncode == 0
    sshd.cut()
    assert connection.ends(within_s=60)
    assert subprocess.run(argv, capture_output=True, timeout=60, check=False).returncode == 255


def test_a_board_behind_another_is_reached(sshd, tmp_path):
    assert Device(sshd.url("jumped"), tmp_path).facts()["python"]


def test_the_python_of_edgekds_own_environment_is_taken_when_there_is_one(sshd, tmp_path):
    python = sshd.home / ".edgekd/venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    try:
        assert Device(sshd.url(), tmp_path).transport.python == str(python)
    finally:
        python.unlink()


def test_a_home_with_a_blank_in_its_name(tmp_path):
    home = tmp_path / "Anna Bo"
    (home / ".edgekd/venv/bin").mkdir(parents=True)
    (home / ".edgekd/venv/bin/python").symlink_to(sys.executable)
    argv = ["/bin/sh", "-c", f"{openssh.OWN_PYTHON} -c 'import sys; print(sys.argv)' x"]
    done = subprocess.run(argv, env=os.environ | {"HOME": str(home)}, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("['-c', 'x']\n", 0)


def test_a_key_that_only_the_agent_has(sshd, tmp_path):
    config = tmp_path / "config"
    config.write_text(
        "\n".join(line for line in sshd.config.read_text().splitlines() if "Identit" not in line)
        + f"\nHost *\n  IdentityFile {tmp_path}/none\n"
    )
    lines = subprocess.run(["ssh-agent", "-s"], capture_output=True, text=True, check=True).stdout
    known = dict(re.findall(r"(SSH_\w+)=([^;]+);", lines))
    try:
        argv = ["ssh-add", "-q", str(sshd.folder / "key")]
        subprocess.run(argv, env=os.environ | known, capture_output=True, check=True)
        with pytest.MonkeyPatch.context() as patch:
            url = sshd.url(python=sys.executable, config=str(config))
            assert "it does not let you in" in failure(url, tmp_path).what
            patch.setenv("SSH_AUTH_SOCK", known["SSH_AUTH_SOCK"])
            assert Device(url, tmp_path).transport.python == sys.executable
    finally:
        os.kill(int(known["SSH_AGENT_PID"]), signal.SIGTERM)


def test_everything_on_the_board_is_below_one_private_folder(sshd, device):
    device.facts()
    assert {path.name for path in sshd.home.iterdir()} == {".edgekd"}
    assert (sshd.home / ".edgekd/files").stat().st_mode & 0o077 == 0


def test_the_connection_goes_with_us_when_we_are_killed(sshd, tmp_path):
    before = set(sshd.sessions())
    script = (
        "import sys, time; from pathlib import Path; from edgekd.device import Device\n"
        "with Device(sys.argv[1], Path(sys.argv[2])).job() as job:\n"
        "    print(job.folder, flush=True)\n"
        "    job.run(['sh', '-c', 'sleep 100 & setsid sleep 100'], timeout=100)"
    )
    argv = [sys.executable, "-c", script, sshd.url(python=sys.executable), str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as host:
        folder = host.stdout.readline().strip()
        assert wait_until(lambda: len(processes_in(folder)) >= 3)
        host.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not processes_in(folder))
    assert wait_until(lambda: set(sshd.sessions()) <= before)


# ---------------------------------------------------------------- files


def test_what_is_there_is_not_sent_again(device, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "engine").write_bytes(os.urandom(300_000))
    for _ in range(2):
        with device.job() as job:
            job.put({"engine": tmp_path / "engine"})
    said = [record.message for record in caplog.records if "bytes sent" in record.message]
    assert [re.findall(r"\d+ bytes sent, \d+ were there", line) for line in said] == [
        ["300000 bytes sent, 0 were there"],
        ["0 bytes sent, 300000 were there"],
    ]


def test_a_damaged_file_on_the_board_is_noticed_and_sent_again(sshd, device, tmp_path):
    (tmp_path / "engine").write_bytes(b"as it was" * 1000)
    with device.job() as job:
        job.put({"first": tmp_path / "engine"})
        for kept in (sshd.home / ".edgekd/files").iterdir():
            kept.write_bytes(b"as it is not")
        job.put({"second": tmp_path / "engine"})
        assert (Path(job.folder) / "second").read_bytes() == b"as it was" * 1000


def test_an_upload_goes_on_where_the_connection_was_lost(sshd, device, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    size = 60_000_000
    (tmp_path / "engine").write_bytes(os.urandom(size))
    files = sshd.home / ".edgekd/files"

    def arrived():
        return sum(part.stat().st_size for part in files.glob("*.part")) > size // 10

    with device.job() as job:
        cutter = threading.Thread(target=lambda: wait_until(arrived) and sshd.cut())
        cutter.start()
        job.put({"engine": tmp_path / "engine"})
        cutter.join()
        assert (Path(job.folder) / "engine").read_bytes() == (tmp_path / "engine").read_bytes()
    said = "\n".join(record.message for record in caplog.records)
    sent, kept = map(int, re.search(r"(\d+) bytes sent, (\d+) were there", said).groups())
    assert "the connection was lost" in said
    assert kept > size // 10
    assert sent + kept == size


def test_a_connection_that_does_not_come_back_is_a_clear_error(sshd, device, tmp_path, impatient):
    (tmp_path / "engine").write_bytes(b"x")
    with device.job() as job:
        sshd.stop()
        with pytest.raises(ConnectionLost) as caught:
            job.put({"engine": tmp_path / "engine"})
    assert caught.value.what == 'device "ssh://board": the connection was lost'
    assert "nobody listens there: the connection is refused" in caught.value.allowed
    assert caught.value.fix == (
        "see whether it is on and in the network, and run it again: what was sent and measured is kept there"
    )


def test_a_command_whose_connection_is_lost_says_so_and_ends_there(sshd, device):
    with device.job() as job:
        threading.Timer(0.5, sshd.cut).start()
        with pytest.raises(ConnectionLost, match='device "ssh://board": the connection was lost'):
            job.run(["sh", "-c", "echo started >&2; sleep 100"], timeout=50)
        assert wait_until(lambda: not processes_in(job.folder))
        assert job.run(["true"], timeout=60).status == 0  # connected again
    assert not Path(job.folder).exists()


def test_a_command_that_cannot_be_run_does_not_end_well(device):
    with device.job() as job:
        shutil.rmtree(job.folder)
        finished = job.run(["true"], timeout=30)
    assert finished.status == porter.NOT_RUN and finished.stdout == ""
    assert finished.stderr_tail == (f"[Errno 2] No such file or directory: '{job.folder}'",)
    with pytest.raises(StageError, match=r"the command failed \(exit status 126\)"):
        finished.check("the command")


def test_a_command_goes_on_as_long_as_heartbeats_come(sshd, device, tmp_path, monkeypatch):
    porter = Path(ssh.porter.__file__).read_text().replace("SILENCE_S = 60.0", "SILENCE_S = 2.0")
    (tmp_path / "porter.py").write_text(porter)
    with device.job() as job:
        monkeypatch.setattr(ssh.porter, "__file__", str(tmp_path / "porter.py"))
        monkeypatch.setattr(ssh.Ssh, "heartbeat_s", 0.2)
        assert job.run(["sleep", "4"], timeout=50).status == 0
        monkeypatch.setattr(ssh.Ssh, "heartbeat_s", None)
        assert job.run(["sleep", "40"], timeout=50).status == -signal.SIGTERM


def test_a_command_ends_when_no_heartbeat_comes(tmp_path, monkeypatch):
    """The host was switched off: the connection stands, and nobody is at its other end."""
    porter = Path(ssh.porter.__file__).read_text().replace("SILENCE_S = 60.0", "SILENCE_S = 0.3")
    (tmp_path / "porter.py").write_text(porter)
    monkeypatch.setattr(ssh.porter, "__file__", str(tmp_path / "porter.py"))
    request = base64.b64encode(json.dumps({"do": "run", "folder": str(tmp_path), "argv": ["sleep", "100"]}).encode())
    with subprocess.Popen([sys.executable, "-c", openssh.program(), request], stdin=subprocess.PIPE) as ours:
        assert ours.wait(60) == 128 + signal.SIGTERM


# ---------------------------------------------------------------- what the user is told


def test_a_host_that_is_not_known(sshd, tmp_path):
    error = failure("ssh://nobody.invalid", tmp_path)
    assert isinstance(error, MissingError)
    assert error.what == 'device "ssh://nobody.invalid": the host name "nobody.invalid" is not known'
    assert error.allowed.startswith("ssh says: ssh: Could not resolve hostname nobody.invalid: ")
    assert error.fix == "correct the name, or give the address: ssh://USER@192.168.0.10"


def test_a_connection_that_is_refused(sshd, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"ssh://127.0.0.1:{taken.getsockname()[1]}"
        error = failure(url, tmp_path)
    assert error.what == f'device "{url}": nobody listens there: the connection is refused'
    assert error.fix == (
        "see whether it has started and runs an ssh server (sudo systemctl enable --now ssh), and its port"
    )


def test_a_host_that_does_not_answer(sshd, tmp_path, monkeypatch):
    monkeypatch.setitem(openssh.OPTIONS, "ConnectTimeout", 1)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        url = f"ssh://127.0.0.1:{mute.getsockname()[1]}"
        error = failure(url, tmp_path)
    assert error.what == f'device "{url}": it does not answer'
    assert error.fix == "see whether it is switched on and in the same network: ping 127.0.0.1"


def test_a_host_key_that_is_not_known(sshd, tmp_path):
    sshd.known_hosts.write_text("")
    error = failure(sshd.url(), tmp_path)
    assert error.what == 'device "ssh://board": its host key is not known here'
    assert error.allowed == "ssh says: Host key verification failed."
    assert error.fix == f"log in once by hand and compare the key that is shown: ssh -F {sshd.config} board"


def test_a_host_key_that_has_changed(sshd, tmp_path):
    private_sshd.make_key(tmp_path / "other")
    sshd.trust(tmp_path / "other.pub")
    error = failure(sshd.url(), tmp_path)
    assert error.what == 'device "ssh://board": its host key has changed since you last logged in'
    forget = f'ssh-keygen -f "{sshd.known_hosts}" -R "[127.0.0.1]:{sshd.port}"'
    assert error.fix == (
        f"if it was set up anew: {forget} && ssh -F {sshd.config} board; if not, somebody else answers in its place"
    )


@pytest.mark.parametrize("switch", ["StrictHostKeyChecking no", "StrictHostKeyChecking accept-new"])
def test_the_users_configuration_cannot_switch_the_check_off(sshd, tmp_path, switch):
    sshd.known_hosts.write_text("")
    careless = tmp_path / "careless"
    careless.write_text(f"{switch}\n{sshd.config.read_text()}")
    assert (
        failure(sshd.url(config=str(careless)), tmp_path).what == 'device "ssh://board": its host key is not known here'
    )
    assert sshd.known_hosts.read_text() == ""


def test_a_key_that_is_not_let_in(sshd, tmp_path):
    private_sshd.make_key(tmp_path / "stranger")
    config = tmp_path / "config"
    config.write_text(sshd.config.read_text().replace(f"{sshd.folder}/key", f"{tmp_path}/stranger"))
    error = failure(sshd.url(config=str(config)), tmp_path)
    assert re.fullmatch(
        r'device "ssh://board": it does not let you in: .*Permission denied \(publickey\)\.', error.what
    )
    assert error.fix.startswith(f"give it your key: ssh-copy-id -F {config} board")


def test_a_board_without_python(sshd, tmp_path):
    error = failure(sshd.url(python="/usr/bin/python9"), tmp_path)
    assert error.what == 'device "ssh://board": there is no /usr/bin/python9'
    assert error.fix == "log in and install it: sudo apt-get install python3"


def test_a_python_that_is_too_old(sshd, tmp_path):
    old = tmp_path / "python3.6"
    old.write_text('#!/bin/sh\necho \'["/usr/bin/python3.6", [3, 6, 9], "/home/pi"]\'; cat\n')
    old.chmod(0o755)
    error = failure(sshd.url(python=str(old)), tmp_path)
    assert (error.what, error.allowed) == ('device "ssh://board": its Python is 3.6.9', "at least 3.8 is needed there")
    assert error.fix == "install a newer one beside it and name it: ssh://board?python=/usr/bin/python3.8"


def test_a_python_that_does_not_start(sshd, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'libpython3.8.so.1.0: cannot open shared object file' >&2; exit 3\n")
    broken.chmod(0o755)
    error = failure(sshd.url(python=str(broken)), tmp_path)
    assert error.what == 'device "ssh://board": its Python ended with exit status 3'
    assert "cannot open shared object file" in error.allowed
    assert error.fix == f"see for yourself: ssh -F {sshd.config} board {broken} --version"


def test_a_login_shell_that_talks(sshd, tmp_path):
    chatty = tmp_path / "python"
    chatty.write_text(f'#!/bin/sh\necho "Welcome to the board"; exec {sys.executable} "$@"\n')
    chatty.chmod(0o755)
    error = failure(sshd.url(python=str(chatty)), tmp_path)
    assert error.what.endswith("its login shell prints before a command runs: b'Welcome to the board\\n'")


def test_a_folder_that_cannot_be_written(sshd, tmp_path):
    (sshd.home / ".edgekd").rename(tmp_path / "kept") if (sshd.home / ".edgekd").exists() else None
    (sshd.home / ".edgekd").write_text("a file in its place")
    try:
        error = failure(sshd.url(), tmp_path)
    finally:
        (sshd.home / ".edgekd").unlink()
    assert error.what.startswith('device "ssh://board": [Errno ')
    assert error.fix == "mend that on the device, and run it again"


STRANGE = """#!/bin/sh
case "$2" in *stdin.read*) echo '["{own}", [3, 11, 0], "{home}"]'; exec cat;; esac
{answer}
"""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("echo hello", "what it answers is not understood: Expecting value"),
        ("echo '[1]'", "what it answers is not understood: a JSON list, not an object"),
        ("echo '{\"made\": 1}'", "what it answers is not understood: 'done'"),
        ("head -c 3000000 /dev/zero", "what it answers is not understood: a line of more than 1048576 bytes"),
        ("head -c 3000 /dev/zero", "its Python ended with exit status 0"),
        ("printf '[%.0s' $(seq 100000); echo", "what it answers is not understood: maximum recursion depth"),
        ("echo 'Illegal instruction' >&2; exit 132", "its Python ended with exit status 132"),
    ],
)
def test_what_a_strange_board_answers_is_refused(sshd, tmp_path, answer, reason):
    own = tmp_path / "python"
    own.write_text(STRANGE.format(own=own, home=sshd.home, answer=answer))
    own.chmod(0o755)
    error = failure(sshd.url(python=str(own)), tmp_path)
    assert isinstance(error, StageError)
    assert error.what.startswith(f'device "ssh://board": {reason}')


def test_a_board_cannot_write_more_than_was_asked_for_nor_anywhere_else(sshd, tmp_path):
    own = tmp_path / "python"
    answer = """echo '{{"done": "../../etc", "bytes": 9000000000}}'; head -c 20000000 /dev/zero"""
    own.write_text(STRANGE.format(own=own, home=sshd.home, answer=answer.replace("{{", "{").replace("}}", "}")))
    own.chmod(0o755)
    device = Device(sshd.url(python=str(own)), tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(StageError), device.job() as job:
        job.get("result.json", tmp_path / "run/result.json", limit_bytes=1000)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["result.json.part"]
    assert (tmp_path / "run/result.json.part").stat().st_size <= 1000


@pytest.mark.parametrize("module", [openssh.porter, openssh.signers])
def test_what_comes_with_a_command_needs_python_3_8_and_its_library_only(module):
    tree = ast.parse(Path(module.__file__).read_text(), feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"signers", *sys.stdlib_module_names}


def test_an_ssh_error_that_is_not_known_is_shown_as_it_is():
    address = Address("ssh://board", "board", None, None, "", "")
    error = explained(address, "some lines\nBad configuration option: frobnicate\n")
    assert str(error) == (
        'error: device "ssh://board": ssh could not log in\n'
        "       ssh says: Bad configuration option: frobnicate\n"
        "fix:   see for yourself: ssh board"
    )


def test_without_an_ssh_client(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    error = failure("ssh://board", tmp_path)
    assert error.what == "ssh cannot be run: No such file or directory"
    assert error.fix == "sudo apt-get install openssh-client"
