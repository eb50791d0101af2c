"""An ssh server of our own on this machine: its own port, host key, home and client configuration."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

SERVER = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
UseDNS no
SetEnv HOME={home} TMPDIR={folder}/tmp
"""
CLIENT = """\
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile none
Host board
  HostName 127.0.0.1
  Port {port}
  User {user}
Host jumped
  HostName 127.0.0.1
  Port {port}
  User {user}
  ProxyJump board
"""


def missing() -> str:
    """Why there can be none here; empty when there can."""
    return "" if server() and shutil.which("ssh") else "no sshd here: sudo apt-get install openssh-server"


def server() -> str | None:
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class Sshd:
    """The server, and the files that belong to it; `url()` names it as the host `board` of its configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.config = folder, folder / "home", folder / "config"
        self.home.mkdir(parents=True)
        (folder / "tmp").mkdir()
        for name in ("host_key", "key"):
            make_key(folder / name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.known_hosts = folder / "known_hosts"
        self.trust(folder / "host_key.pub")
        names = {"folder": folder, "port": self.port, "home": self.home, "user": pwd.getpwuid(os.getuid()).pw_name}
        self.config.write_text(CLIENT.format(**names))
        (folder / "sshd_config").write_text(SERVER.format(**names))
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def url(self, host: str = "board", **options: str) -> str:
        given = "&".join(f"{name}={value}" for name, value in {"config": self.config, **options}.items())
        return f"ssh://{host}?{given}"

    def trust(self, public_key: Path) -> None:
        """Let our client know the host by this key, and no other."""
        kind, key = public_key.read_text().split()[:2]
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def start(self) -> None:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        program = server()
        assert program
        argv = [program, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(argv, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise RuntimeError((self.folder / "log").read_text())

    def stop(self) -> None:
        """End it with all its connections."""
        if self.process:
            sessions = self.sessions()
            self.process.terminate()
            self.process.wait()
            kill(sessions)
        self.process = None

    def sessions(self) -> list[int]:
        """The server's processes for connections that stand."""
        assert self.process
        return [pid for pid in descendants(self.process.pid) if name_of(pid).startswith("sshd")]

    def cut(self) -> None:
        """End the connections as if the network had; the listener stays."""
        kill(self.sessions())


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", path], check=True)


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def descendants(ancestor: int) -> list[int]:
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found = [ancestor]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]
