"""Which Jetson this is, read from its files; `root` is where they are, for tests and for copies of a board's disk."""

from __future__ import annotations

import glob
import os
import re
from typing import Any

# L4T as JetPack; a release that is not here is given by its L4T alone.
JETPACKS = {
    "32.6.1": "4.6", "32.7.1": "4.6.1", "32.7.2": "4.6.2", "32.7.3": "4.6.3", "32.7.4": "4.6.4", "32.7.5": "4.6.5",
    "32.7.6": "4.6.6", "35.1.0": "5.0.2", "35.2.1": "5.1", "35.3.1": "5.1.1", "35.4.1": "5.1.2", "35.5.0": "5.1.3",
    "35.6.0": "5.1.4", "35.6.1": "5.1.5", "35.6.2": "5.1.5", "35.6.3": "5.1.5", "35.6.4": "5.1.6", "36.3.0": "6.0",
    "36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "36.4.7": "6.2.1", "36.5.0": "6.2.2", "36.5.2": "6.2.3",
    "38.2.0": "7.0", "38.2.1": "7.0", "38.2.2": "7.0", "38.4.0": "7.1", "39.2.0": "7.2",
}  # fmt: skip
TRTEXEC = ("usr/src/tensorrt/bin/trtexec", "usr/local/tensorrt/bin/trtexec")


def board(root: str = "/") -> dict[str, Any]:
    """Facts of the board, None for what its files do not say.

    model, soc (as "tegra234"), l4t, jetpack, tensorrt and cuda (versions of the installed packages), power_modes {id:
    name}, power_mode (the id it started with), trtexec (path).
    """
    l4t = _l4t(root)
    packages = _packages(root)
    compatible = _text(root, "proc/device-tree/compatible").split("\0")
    socs = [name.partition(",")[2] for name in compatible if name.startswith("nvidia,tegra")]
    modes = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", _text(root, "etc/nvpmodel.conf"))
    status = re.search(r"pmode:(\d+)", _text(root, "var/lib/nvpmodel/status"))
    return {
        "model": _text(root, "proc/device-tree/model").rstrip("\0").strip() or None,
        "soc": socs[-1] if socs else None,
        "l4t": l4t,
        "jetpack": JETPACKS.get(l4t or ""),
        "tensorrt": _version(packages, r"libnvinfer\d+"),
        "cuda": _version(packages, r"cuda-cudart-\d+-\d+"),
        "power_modes": {int(number): name for number, name in modes},
        "power_mode": int(status.group(1)) if status else None,
        "trtexec": trtexec(root),
    }


def trtexec(root: str = "/", path: str | None = None) -> str | None:
    """Where trtexec is: on the PATH, or where NVIDIA's packages put it. Some images lack it."""
    folders = (os.environ.get("PATH", "") if path is None else path).split(os.pathsep)
    places = [os.path.join(folder, "trtexec") for folder in folders] + [os.path.join(root, place) for place in TRTEXEC]
    return next((place for place in places if os.path.isfile(place) and os.access(place, os.X_OK)), None)


def _l4t(root: str) -> str | None:
    """35.4.1 of `# R35 (release), REVISION: 4.1, ...`, or of the package nvidia-l4t-core."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _text(root, "etc/nv_tegra_release"))
    if found:
        minor, _, patch = found.group(2).partition(".")
        return f"{found.group(1)}.{minor}.{patch or 0}"
    package = re.match(r"\d+\.\d+\.\d+", _packages(root).get("nvidia-l4t-core", ""))
    return package.group(0) if package else None


def _packages(root: str) -> dict[str, str]:
    """Versions of the installed packages."""
    found = {}
    for status in [
        os.path.join(root, "var/lib/dpkg/status"),
        *glob.glob(os.path.join(root, "var/lib/dpkg/status.d/*")),
    ]:
        for paragraph in _text(root, os.path.relpath(status, root)).split("\n\n"):
            fields = dict(line.split(": ", 1) for line in paragraph.split("\n") if ": " in line and line[0] != " ")
            if "Package" in fields and fields.get("Status", "installed").endswith("installed"):
                found[fields["Package"]] = fields.get("Version", "")
    return found


def _version(packages: dict[str, str], name: str) -> str | None:
    """The upstream version of the first package whose name matches."""
    versions = [version for package, version in sorted(packages.items()) if re.fullmatch(name, package)]
    return re.split(r"[-+]", versions[0])[0] if versions else None


def _text(root: str, name: str) -> str:
    try:
        with open(os.path.join(root, name), encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
