"""What machine this is: what the kernel, the system's files and Python's packages say of it."""

from __future__ import annotations

import glob
import os
import platform
import re
import shutil
import subprocess
import sys
from typing import Any

from . import VERSION
from .power import Rails
from .sensors import Sensors, number, read

# By the name of the distribution that holds it; several hold ONNX Runtime.
RUNTIMES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "apache-tvm", "apache-tvm-ffi", "tensorrt", "openvino", "ncnn",
    "tflite-runtime", "ai-edge-litert",
)  # fmt: skip
TRTEXEC = ("usr/src/tensorrt/bin/trtexec", "usr/local/tensorrt/bin/trtexec")
NVINFER_HEADERS = ("usr/include/*/NvInferVersion.h", "usr/include/NvInferVersion.h")
# What /proc/sys/kernel/arch says of the kernel, and what a program may then find as its machine.
FAMILIES = {"x86_64": ("x86_64", "i386", "i586", "i686"), "aarch64": ("aarch64", "armv7l", "armv8l")}


def facts(root: str = "/") -> dict[str, Any]:
    """What machine this is, and how it is doing right now."""
    sensors = Sensors(root)
    cpuinfo = _fields(read(os.path.join(root, "proc/cpuinfo")), ":")
    release = _fields(read(os.path.join(root, "etc/os-release")), "=")
    memory = _fields(read(os.path.join(root, "proc/meminfo")), ":")
    policies = sorted(glob.glob(os.path.join(root, "sys/devices/system/cpu/cpufreq/policy*")))
    highest = [number(read(os.path.join(policy, "cpuinfo_max_freq"))) for policy in policies]
    libc, libc_version = platform.libc_ver()
    return {
        "model": _model(root),
        "soc": _compatible(root),
        "machine": platform.machine(),
        "emulated": emulated(root),
        "cpu": cpuinfo.get("model name") or cpuinfo.get("Hardware") or cpuinfo.get("CPU part") or platform.processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _kib(memory.get("MemTotal")),
        "memory_available_bytes": _kib(memory.get("MemAvailable")),
        "disk_free_bytes": shutil.disk_usage(".").free,
        "os": release.get("PRETTY_NAME", "").strip('"') or platform.system(),
        "l4t": _l4t(root),
        "kernel": platform.release(),
        "libc": f"{libc} {libc_version}".strip(),
        "virtual": "hypervisor" in cpuinfo.get("flags", "").split(),
        "governors": sorted({text for text in (read(os.path.join(p, "scaling_governor")) for p in policies) if text}),
        "max_clock_hz": max((1000 * khz for khz in highest if khz), default=None),
        "power_mode": _power_mode(root),
        "rails": Rails(root).names(),
        "python": platform.python_version(),
        "interpreter": sys.executable,
        "numpy": _version("numpy"),
        "runtimes": {name: version for name in RUNTIMES for version in [_version(name)] if version},
        "tensorrt": _tensorrt(root),
        "trtexec": _trtexec(root),
        "agent": VERSION,
        # Who has signed this program and what came with it, where somebody has checked that.
        "signed_by": os.environ.get("EDGEKD_SIGNED_BY", ""),
        "now": dict(sensors.sample(), **_firmware(root)),
    }


def emulated(root: str = "/") -> bool:
    """Whether this program's instructions are translated for a machine of another kind: then no time means anything."""
    kernel = read(os.path.join(root, "proc/sys/kernel/arch"))  # since Linux 6.1
    if kernel:
        return platform.machine() not in FAMILIES.get(kernel, (kernel, platform.machine()))
    # An emulator shows a program's own command line as it should be, but not its parent's.
    parent = read(os.path.join(root, f"proc/{os.getppid()}/cmdline"))
    return os.path.basename(parent).startswith("qemu-") or "/qemu-" in parent


def _fields(text: str, separator: str) -> dict[str, str]:
    pairs = (line.split(separator, 1) for line in text.split("\n") if separator in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _kib(text: str | None) -> int | None:
    return 1024 * int(text.split()[0]) if text else None


def _model(root: str) -> str:
    names = ("sys/firmware/devicetree/base/model", "sys/class/dmi/id/product_name", "sys/class/dmi/id/board_name")
    return next((text for text in (read(os.path.join(root, name)) for name in names) if text), "")


def _compatible(root: str) -> str:
    """The system on a chip, as `vendor,chip`: the last, most general name that the board's device tree gives itself."""
    try:
        with open(os.path.join(root, "sys/firmware/devicetree/base/compatible"), "rb") as file:
            names = file.read(4096).decode("ascii", "replace").split("\0")
    except OSError:
        return ""
    return next((name for name in reversed(names) if name), "")


def _l4t(root: str) -> str:
    """The release of Jetson Linux, such as 36.4.3."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", read(os.path.join(root, "etc/nv_tegra_release")))
    return "{}.{}".format(*found.groups()) if found else ""


def _power_mode(root: str) -> str:
    """Jetson's by name, else the ACPI platform profile."""
    number_of_mode = read(os.path.join(root, "var/lib/nvpmodel/status")).partition("pmode:")[2]
    if not number_of_mode.isdigit():
        return read(os.path.join(root, "sys/firmware/acpi/platform_profile"))
    modes = re.findall(r"POWER_MODEL ID=(\d+) NAME=(\S+)", read(os.path.join(root, "etc/nvpmodel.conf")))
    names = {int(index): name for index, name in modes}  # type: dict[int, str]
    return names.get(int(number_of_mode), number_of_mode)


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tensorrt(root: str) -> str:
    """The version of the TensorRT libraries, from their header."""
    for pattern in NVINFER_HEADERS:
        for header in glob.glob(os.path.join(root, pattern)):
            parts = dict(re.findall(r"define (?:NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH)\w* (\d+)", read(header)))
            if len(parts) == 3:
                return "{MAJOR}.{MINOR}.{PATCH}".format(**parts)
    return ""


def _trtexec(root: str) -> str:
    """Where it is: Jetson's packages do not put it on the PATH."""
    paths = [os.path.join(root, path) for path in TRTEXEC]
    return shutil.which("trtexec") or next((path for path in paths if os.access(path, os.X_OK)), "")


def _firmware(root: str) -> dict[str, Any]:
    """What the Raspberry Pi's own tool says where its kernel does not. Too slow to ask while something is timed."""
    if Sensors(root).throttled() is not None or not os.path.exists(os.path.join(root, "usr/bin/vcgencmd")):
        return {}
    argv = [os.path.join(root, "usr/bin/vcgencmd"), "get_throttled"]
    try:
        said = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5, check=False).stdout
        return {"throttled": int(said.decode().partition("throttled=")[2], 16)}
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}
