"""What a device has and lacks for edgekd, and the installation of what it lacks, which needs no network there."""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgekd.artifact import sha256_of
from edgekd.device import Device, Finished, disk_full, free_some_space, last_lines, text_from_holder
from edgekd.errors import DiskFull, MissingError

_log = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT_S = 900.0
INSTALL_TIMEOUT_S = 1800.0  # a slow card, and some thousand files
MIN_FREE_BYTES = 1 << 30
BUSY = 0.3  # load per core above which a benchmark would be disturbed
THROTTLED_NOW = 0xF  # of the Raspberry Pi's flags
SET_GOVERNOR = "echo performance | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor"
# The oldest C library that wheels name, by machine.
OLDEST_GLIBC = {"aarch64": 17, "x86_64": 5, "armv7l": 17}


@dataclass(frozen=True)
class Finding:
    """Something looked at; `fix` is the command that mends it, empty when all is well."""

    what: str
    found: str
    fix: str = ""


# ---------------------------------------------------------------- what is there


def findings(facts: dict[str, Any], packages: Sequence[str], install: str) -> list[Finding]:
    """What the facts of a device mean for edgekd.

    packages: those that must be there; install: the command that brings all that are not.
    """
    return [*_machine(facts), *_software(facts, packages, install), *_condition(facts)]


def install_command(url: str, packages: Sequence[str], options: Sequence[str] = ()) -> str:
    """What brings packages to a device; options: of `edgekd doctor`, that say what for."""
    here = ["pip", "install", *packages]
    return shlex.join(
        here if url.startswith("local:") else ["edgekd", "doctor", "--device", url, *options, "--install"]
    )


def installed_url(url: str) -> str:
    """The device's URL without the Python that it names: by it, the one is taken that `install` has made."""
    address, _, query = url.partition("?")
    kept = [option for option in query.split("&") if option and not option.startswith("python=")]
    return "?".join([address, "&".join(kept)] if kept else [address])


def turn(device: Device) -> Finding:
    """Whether a job has the device now."""
    who = device.transport.holder()
    return Finding("in use", f"by {text_from_holder(who)}" if who else "by nobody", "wait for it" if who else "")


def _machine(facts: dict[str, Any]) -> Iterator[Finding]:
    soc = f" ({facts['soc']})" if facts["soc"] else ""
    yield Finding("board", f"{facts['model'] or 'of an unknown model'}{soc}")
    kind = ", emulated: no time measured there is a board's" if facts["emulated"] else ""
    kind = kind or (", virtual" if facts["virtual"] else "")
    yield Finding("processor", f"{facts['cpu']}, {facts['usable_cores']} cores, {facts['machine']}{kind}")
    l4t = f", L4T {facts['l4t']}" if facts["l4t"] else ""
    yield Finding("system", f"{facts['os']}{l4t}, Linux {facts['kernel']}, {facts['libc'] or 'no glibc'}")


def _software(facts: dict[str, Any], packages: Sequence[str], install: str) -> Iterator[Finding]:
    yield Finding("python", f"{facts['python']}, {facts['interpreter']}")
    found = dict(facts["runtimes"])
    for package in packages:
        versions = [found.pop(name) for name in (package, f"{package}-gpu") if name in found]
        yield Finding(package, versions[0] if versions else "not installed", "" if versions else install)
    yield from (Finding(name, version) for name, version in found.items())
    if facts["l4t"] or facts["tensorrt"]:
        for what, package in (("tensorrt", "tensorrt"), ("trtexec", "libnvinfer-bin")):
            yield Finding(what, facts[what] or "not found", "" if facts[what] else f"sudo apt-get install {package}")


def _condition(facts: dict[str, Any]) -> Iterator[Finding]:
    now = facts["now"]
    free = facts["disk_free_bytes"]
    yield Finding("disk", f"{free / 1e9:.1f} GB free", "" if free > MIN_FREE_BYTES else "free some space there")
    if facts["memory_bytes"] and facts["memory_available_bytes"]:
        gigabytes = f"{facts['memory_available_bytes'] / 1e9:.1f} of {facts['memory_bytes'] / 1e9:.1f} GB available"
        yield Finding("memory", gigabytes)
    if facts["power_mode"]:
        yield Finding("power mode", facts["power_mode"])
    if facts["governors"]:
        steady = facts["governors"] == ["performance"]
        yield Finding("governor", ", ".join(facts["governors"]), "" if steady else SET_GOVERNOR)
    if now["clock_hz"]:
        highest = f" of {facts['max_clock_hz'] / 1e6:.0f}" if facts["max_clock_hz"] else ""
        yield Finding("clock", f"{max(now['clock_hz']) / 1e6:.0f}{highest} MHz")
    if now["temperature_c"]:
        degrees = (f"{zone} {value:.0f} °C" for zone, value in now["temperature_c"].items())
        yield Finding("temperature", ", ".join(degrees))
    if now["throttled"] is not None:
        yield _throttling(now["throttled"])
    if facts["rails"]:
        yield Finding("power sensors", ", ".join(facts["rails"]))
    if now["load_average"] is not None:
        quiet = now["load_average"] <= BUSY * facts["cores"]
        yield Finding("load", f"{now['load_average']:.2f}", "" if quiet else "stop what else runs there: top")


def _throttling(flags: int) -> Finding:
    if not flags:
        return Finding("throttling", "none since it was switched on")
    when = "now" if flags & THROTTLED_NOW else "some time ago"
    return Finding("throttling", f"{when} (0x{flags:x})", "cool the board, and use its own power supply")


# ---------------------------------------------------------------- what is missing


def install(device: Device, packages: Sequence[str]) -> None:
    """Install packages into ~/.edgekd/venv on the device, whose Python every later connection takes.

    The wheels are downloaded here and sent, so that the device needs no network, and neither pip nor its package for
    virtual environments. What the device's own Python has (on a Jetson: tensorrt) stays visible in there.

    Raises MissingError when there are no such wheels for the device, DiskFull when they have no room there, StageError
    when they cannot be installed.
    """
    if device.url.partition(":")[0] == "local":
        raise MissingError(
            "edgekd does not install into the environment that it runs in",
            allowed="--install is for boards: --device ssh://...",
            fix="pip install 'edgekd[train]'",
        )
    facts = device.facts()
    with tempfile.TemporaryDirectory() as folder, device.reserved(_log.warning), device.job() as job:
        pip = _download(facts, packages, Path(folder), device.url)
        _check_room(Path(folder), facts["disk_free_bytes"], device)
        job.put({"wheels": Path(folder)})
        venv = PurePosixPath(job.folder).parents[1] / "venv"
        python = str(venv / "bin/python")
        if facts["interpreter"] != python:
            argv = [job.python, "-m", "venv", "--clear", "--without-pip", "--system-site-packages", str(venv)]
            _check(job.run(argv, timeout=INSTALL_TIMEOUT_S), f'making {venv} on "{device.url}"', device.url)
        argv = [python, f"wheels/{pip}/pip", "install", "--quiet", "--no-index", "--find-links", "wheels"]
        done = job.run([*argv, *packages], timeout=INSTALL_TIMEOUT_S)
        _check(done, f'installing on "{device.url}"', device.url)
    if device.url != installed_url(device.url):
        _log.warning("all is in %s, for: --device %s", venv, shlex.quote(installed_url(device.url)))


def _check_room(folder: Path, free: int, device: Device) -> None:
    """Raises DiskFull where wheels have no room on the device: what they hold, the bytecode that pip makes of it,
    themselves unless an earlier attempt has sent them, and the copy in the job."""
    wheels = {sha256_of(wheel): wheel for wheel in folder.glob("*.whl")}
    kept, needed = device.transport.kept(list(wheels)), 0
    for sha256, wheel in wheels.items():
        needed += wheel.stat().st_size * (1 if sha256 in kept else 2)
        with zipfile.ZipFile(wheel) as archive:
            needed += sum(file.file_size * (1 + file.filename.endswith(".py")) for file in archive.infolist())
    if needed > free:
        raise disk_full(device.url, "~/.edgekd", free, needed)


def _check(finished: Finished, what: str, url: str) -> None:
    """Raises DiskFull when somebody else has filled the disk meanwhile, StageError when it failed otherwise."""
    if finished.status and any(os.strerror(errno.ENOSPC) in line for line in finished.stderr_tail):
        said = last_lines(finished.stderr_tail)
        raise DiskFull(f"{what} failed: its disk is full", allowed=said, fix=free_some_space(url))
    finished.check(what)


def _download(facts: dict[str, Any], packages: Sequence[str], folder: Path, url: str) -> str:
    """Fetch the wheels that fit the device, with all that they need and pip itself; return the name of pip's."""
    machine, python = facts["machine"], facts["python"].split(".")
    target = f"Python {facts['python']} on {machine} with {facts['libc'] or 'no glibc'}"
    glibc = re.fullmatch(r"glibc 2\.(\d+)", facts["libc"])
    lines = ["there are wheels for Linux with glibc only"]
    if glibc and machine in OLDEST_GLIBC:
        # Every tag by name: pip takes none for implied by another.
        tags = [f"manylinux_2_{minor}_{machine}" for minor in range(int(glibc[1]), OLDEST_GLIBC[machine] - 1, -1)]
        tags += [f"manylinux2014_{machine}", "any"]
        argv = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:",
            "--dest", str(folder), "--implementation", "cp", "--python-version", ".".join(python[:2]),
            *(word for abi in (f"cp{python[0]}{python[1]}", "abi3", "none") for word in ("--abi", abi)),
            *(word for tag in tags for word in ("--platform", tag)), *packages, "pip",
        ]  # fmt: skip
        done = subprocess.run(argv, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
        lines = done.stderr.strip().splitlines()
        if done.returncode == 0:
            return next(folder.glob("pip-*.whl")).name
    raise MissingError(
        f'device "{url}": no wheels of {", ".join(packages)} for {target} were found',
        allowed=last_lines(lines[-3:]),
        fix="see whether this machine has a network and pip (python -m ensurepip), or use a 64-bit system on the board",
    )
