"""The device's end of a transport: keeps files and job folders there, and runs commands that end when we do.

Stands alone with signers.py: Python 3.8 and the standard library. Over ssh their text travels with every request, so
that nothing must be installed on a board or kept in step with us.

    ROOT/jobs/job-*            a folder per job, as root
    ROOT/files/SHA256          what was ever sent: it is not sent again
    ROOT/files/SHA256.part     ... as far as it has arrived
    TMP/edgekd.lock            locked while somebody's job has the device; says whose

Where the device's owner lists keys, a job's folder runs only what one of them has signed: see signers.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, BinaryIO

if __package__:  # over ssh its text comes before ours, and what it defines is here already
    from .signers import MANIFEST, SIGNED_BY, UnsignedError, signer_of

CHUNK_BYTES = 1 << 18
STALE_JOB_S = 3600  # a job folder that nobody works in is kept so long for a benchmark to go on in
STALE_FILE_S = 30 * 86400
HEARTBEAT_S = 10.0  # how often the host says that it is there
SILENCE_S = 60.0  # after which it is taken for dead
GRACE_S = 2.0
UNSIGNED = 77  # the exit status of what may not be run
NOT_RUN = 126  # ... and of what cannot be
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)


class RefusedError(Exception):
    """What was asked for cannot be done; the arguments go to the host as they are."""


def refusal(error: OSError, place: str, lacking: int = 0) -> RefusedError:
    """Why the system did not do it; on a full disk with the bytes free where we write, and those still lacking."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        there = os.path.abspath(place)
        while not os.path.exists(there):  # not even the folder could be made
            there = os.path.dirname(there)
        return RefusedError("disk full", place, shutil.disk_usage(there).free, lacking)
    return RefusedError("system", str(error))


# ---------------------------------------------------------------- job folders


def make(root: str, name: str) -> str:
    """A folder for a job: `job-NAME`, with what an interrupted job of that name left there, or a fresh one."""
    jobs = os.path.join(root, "jobs")
    os.makedirs(jobs, mode=0o700, exist_ok=True)
    clean(root)
    folder = os.path.join(jobs, "job-" + name)
    if not name or processes_in(folder):
        return tempfile.mkdtemp(prefix="job-", dir=jobs)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    os.utime(folder)
    return folder


def clean(root: str) -> None:
    """Delete job folders whose owner is gone, and files that were not used for long."""
    now = time.time()
    for folder in glob.glob(os.path.join(root, "jobs", "job-*")):
        if now - _modified(folder) > STALE_JOB_S and not processes_in(folder):
            shutil.rmtree(folder, ignore_errors=True)
    for file in glob.glob(os.path.join(root, "files", "*")):
        if now - _modified(file) > STALE_FILE_S:
            _delete(file)


def remove(root: str, folder: str) -> None:
    """End what still runs in a job's folder, and delete it."""
    if os.path.dirname(folder) != os.path.join(root, "jobs"):
        raise RefusedError(folder + " is no job's folder")
    for pid in processes_in(folder):
        _kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def processes_in(folder: str) -> list[int]:
    """Our processes that work in a folder or below it."""
    found = []
    for link in glob.glob("/proc/[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # it ended while we looked, or is not ours
            if (os.readlink(link) + "/").startswith(folder + "/"):
                found.append(int(link.split("/")[2]))
    return found


def _modified(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return time.time()


def _delete(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


# ---------------------------------------------------------------- files


def receive(root: str, folder: str, incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """Put files into a job's folder, and ask for those only that are not here yet.

    In comes a line {path below the folder: [sha256, bytes]}; out goes a line {sha256: bytes that are here already} of
    the files wanted, in order; in come the bytes that they lack, one file after the other.
    """
    files = os.path.join(root, "files")
    os.makedirs(files, mode=0o700, exist_ok=True)
    sent = json.loads(incoming.readline())  # type: dict[str, list[Any]]
    sizes = dict(sent.values())
    wanted = {sha256: _size(os.path.join(files, sha256 + ".part")) for sha256 in sizes if not _here(files, sha256)}
    wanted = {sha256: here if here <= sizes[sha256] else 0 for sha256, here in wanted.items()}
    free, lacking = shutil.disk_usage(root).free, _lacking(files, folder, sent)
    if lacking > free:
        raise RefusedError("disk full", root, free, lacking)
    _say(outgoing, wanted)
    try:
        for sha256, here in wanted.items():
            _take(os.path.join(files, sha256), here, sizes[sha256], incoming)
        for path, (sha256, _) in sorted(sent.items()):
            _place(os.path.join(files, sha256), os.path.join(folder, path))
    except OSError as error:  # somebody else has filled the disk meanwhile
        raise refusal(error, root, _lacking(files, folder, sent)) from None


def _lacking(files: str, folder: str, sent: dict[str, list[Any]]) -> int:
    """The bytes that are still to be written: what has not arrived, and its copies in the job's folder."""
    arriving = {sha256: os.path.join(files, sha256) for sha256, _ in sent.values() if not _here(files, sha256)}
    sizes = dict(sent.values())  # type: dict[str, int]
    copies = {os.path.join(folder, path): size for path, (_, size) in sent.items()}  # type: dict[str, int]
    lacking = sum(max(0, sizes[sha256] - _size(file + ".part")) for sha256, file in arriving.items())
    return lacking + sum(max(0, size - _size(path)) for path, size in copies.items())


def _take(file: str, here: int, size: int, incoming: BinaryIO) -> None:
    """Append what comes in to what has arrived; what came before a lost connection stays."""
    with open(file + ".part", "r+b" if here else "wb") as part:
        part.truncate(here)
        part.seek(here)
        while here < size:
            chunk = incoming.read(min(CHUNK_BYTES, size - here))
            if not chunk:
                raise RefusedError("cut off")
            part.write(chunk)
            here += len(chunk)
    os.replace(file + ".part", file)


def _place(file: str, target: str) -> None:
    """Copy, not link: what a job does to its files must not reach what is kept. What is damaged is not kept either."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    digest = hashlib.sha256()
    with open(file, "rb") as source, open(target, "wb") as copy:
        for chunk in iter(lambda: source.read(CHUNK_BYTES), b""):
            digest.update(chunk)
            copy.write(chunk)
    os.utime(file)
    if digest.hexdigest() != os.path.basename(file):
        _delete(file)
        raise RefusedError("corrupt", os.path.basename(target))


def kept(root: str, files: list[str]) -> list[str]:
    """Those of these files, all by their sha256, that were sent before."""
    return [sha256 for sha256 in files if _here(os.path.join(root, "files"), sha256)]


def _here(files: str, sha256: str) -> bool:
    return os.path.isfile(os.path.join(files, sha256))


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def fetch(folder: str, name: str, limit: int, outgoing: BinaryIO) -> None:
    """Send one regular file: a line {bytes}, the bytes, a line {sha256}. Links are not followed."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path) or os.path.islink(path):
        raise RefusedError("absent")
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size
        if left > limit:
            raise RefusedError("large", left)
        _say(outgoing, {"bytes": left})
        digest = hashlib.sha256()
        while left:
            chunk = file.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise RefusedError("absent")
            digest.update(chunk)
            outgoing.write(chunk)
            left -= len(chunk)
    _say(outgoing, {"sha256": digest.hexdigest()})


def _say(outgoing: BinaryIO, message: Any) -> None:
    outgoing.write(json.dumps(message).encode() + b"\n")
    outgoing.flush()


# ---------------------------------------------------------------- one job at a time


def device_lock() -> str:
    """The file that all who log in here share."""
    return os.path.join(_temporary_folder(), "edgekd.lock")


def _temporary_folder() -> str:
    """Where tempfile.gettempdir() looks first, which tries by writing: a full disk would move our lock, or hide it."""
    named = [os.environ.get(name, "") for name in ("TMPDIR", "TEMP", "TMP")]
    usable = [folder for folder in [*named, "/tmp", "/var/tmp"] if os.access(folder, os.W_OK | os.X_OK)]
    return os.path.abspath(usable[0]) if usable else "/tmp"


def take(lock: str, owner: dict[str, str]) -> int:
    """Lock the device for one job: until the descriptor is closed, or its process dies, of whatever.

    What the same owner holds is taken over: a connection that was lost may not have been noticed here. Raises
    RefusedError("busy", who) while another owner holds it.
    """
    deadline = time.monotonic() + GRACE_S
    while True:
        descriptor = _opened(lock)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Unless somebody has deleted it meanwhile: then a third one may lock a file of the same name.
            if os.path.exists(lock) and os.path.samestat(os.stat(lock), os.fstat(descriptor)):
                break
        except BlockingIOError:
            who = _written(descriptor)
            ours = who.get("token") == owner["token"] and who["pid"].isdigit()
            if not ours or time.monotonic() > deadline:
                os.close(descriptor)
                raise RefusedError("busy", who) from None
            _kill(int(who["pid"]), signal.SIGKILL)
            time.sleep(0.05)
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(dict(owner, pid=os.getpid())).encode(), 0)
    return descriptor


def holder(lock: str) -> dict[str, Any]:
    """Who has locked the device; empty when nobody has."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return {}
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return {}
    except BlockingIOError:
        return _written(descriptor)
    finally:
        os.close(descriptor)


def _opened(lock: str) -> int:
    """The lock's file, for everybody. Where folders are shared, Linux forbids O_CREAT for a file of somebody else's."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.fchmod(descriptor, 0o666)
            return descriptor


def _written(descriptor: int) -> dict[str, Any]:
    """What the lock's holder wrote of itself; anybody may have written there."""
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        return {name: str(who.get(name, ""))[:100] for name in ("user", "host", "since", "token", "pid")}
    except (ValueError, AttributeError):
        return {"user": "somebody"}


def hold(lock: str, owner: dict[str, str], outgoing: BinaryIO) -> None:
    """Lock the device until the host goes."""
    descriptor = take(lock, owner)
    _say(outgoing, {"done": None})
    _wait_for_the_host_to_go()
    os.close(descriptor)


# ---------------------------------------------------------------- commands


def run(folder: str, argv: list[str]) -> int:
    """Run a command to its end, and end it with all that it started when the host goes: standard input closes, or no
    heartbeat comes. Returns its exit status, 128 + N when signal N ended it, UNSIGNED when it may not be run."""
    try:
        signer = signer_of(os.path.join(folder, MANIFEST))
    except UnsignedError as error:
        sys.stderr.write(f"{error}\n")
        return UNSIGNED
    for pid in processes_in(folder):  # what a lost connection left there: it must not run beside us
        _kill(pid, signal.SIGKILL)
    os.chdir(folder)
    prctl = getattr(ctypes.CDLL(None), "prctl", lambda *arguments: None)
    # What the command leaves behind becomes our child instead of init's, so that we find it.
    prctl(_SET_CHILD_SUBREAPER, 1)
    try:
        child = subprocess.Popen(
            argv, stdin=subprocess.PIPE, start_new_session=True, env=dict(os.environ, **{SIGNED_BY: signer}),
            preexec_fn=lambda: prctl(_SET_PDEATHSIG, signal.SIGKILL),
        )  # fmt: skip
    except OSError as error:
        sys.stderr.write(f"{argv[0]} cannot be run: {error.strerror}\n")
        return 127
    ended = threading.Event()
    threading.Thread(target=_end_without_host, args=(child, ended), daemon=True).start()
    status = child.wait()
    ended.set()
    _end_descendants()
    return 128 - status if status < 0 else status


def _end_without_host(child: subprocess.Popen[bytes], ended: threading.Event) -> None:
    _wait_for_the_host_to_go()
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGTERM)
    if not ended.wait(GRACE_S):
        for pid in _descendants():
            _kill(pid, signal.SIGKILL)


def _wait_for_the_host_to_go() -> None:
    """Until it closes our standard input, or says nothing there for long."""
    while select.select([0], [], [], SILENCE_S)[0] and os.read(0, 4096):
        pass


def _end_descendants() -> None:
    """Ask what is left to go, and insist. Somebody may still have to put the clocks back."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _descendants():
            _kill(pid, number)
        deadline = time.monotonic() + GRACE_S
        while _descendants() and time.monotonic() < deadline:
            time.sleep(0.05)


def _descendants() -> list[int]:
    """Every process that comes from us, whatever group or session it has put itself into."""
    parents = {}
    for file in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError), open(file) as content:
            parents[int(file.split("/")[2])] = int(content.read().rpartition(")")[2].split()[1])
    found = [os.getpid()]
    for ancestor in found:
        found += [pid for pid, parent in parents.items() if parent == ancestor]
    return found[1:]


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def main(request: str) -> int:
    """Do what a request asks: {do, and the arguments of the function of that name}, as JSON in base64."""
    arguments = json.loads(base64.b64decode(request))
    do = arguments.pop("do")
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    try:
        if do == "run":
            return run(**arguments)
        if do == "receive":
            receive(incoming=incoming, outgoing=outgoing, **arguments)
            _say(outgoing, {"done": None})
        elif do == "fetch":
            fetch(outgoing=outgoing, **arguments)
        elif do == "make":
            _say(outgoing, {"done": make(**arguments)})
        elif do == "kept":
            _say(outgoing, {"done": kept(**arguments)})
        elif do == "hold":
            hold(lock=device_lock(), outgoing=outgoing, **arguments)
        elif do == "holder":
            _say(outgoing, {"done": holder(device_lock())})
        else:
            remove(**arguments)
            _say(outgoing, {"done": None})
    except RefusedError as error:
        _say(outgoing, {"refused": error.args})
    except OSError as error:
        if do == "run":  # standard output is the command's: the host learns by the status that it was not run
            sys.stderr.write(f"{error}\n")
            return NOT_RUN
        place = arguments.get("root") or arguments.get("folder") or _temporary_folder()
        _say(outgoing, {"refused": refusal(error, place).args})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
