"""What machine this is and how it is doing: the kernel's own files, read so that nothing they do can hurt."""

from __future__ import annotations

import glob
import os
import platform
from typing import Any

from . import VERSION


def read(path: str, limit: int = 1 << 16) -> str:
    """The text of a small file, or "" when it cannot be read.

    Not open().read(): some sysfs files (a thermal zone of a unit that is off) answer EAGAIN, which makes Python's file
    objects return None or raise TypeError.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        return os.read(handle, limit).decode("utf-8", "replace").replace("\0", "").strip()
    except OSError:
        return ""
    finally:
        os.close(handle)


def number(text: str) -> int | None:
    """The integer that a sensor file holds, or None."""
    try:
        return int(text)
    except ValueError:
        return None


class Sensors:
    """What the kernel's files under `root` say about the machine."""

    def __init__(self, root: str = "/") -> None:
        self.root = root
        self._ticks_per_s = os.sysconf("SC_CLK_TCK")
        self._zones = sorted(glob.glob(self._path("sys/class/thermal/thermal_zone*")))
        self._clocks = sorted(glob.glob(self._path("sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq")))

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def cpu_seconds(self) -> tuple[float, float] | None:
        """CPU seconds since boot: (busy over all cores, stolen by the hypervisor), or None."""
        fields = read(self._path("proc/stat"), 512).split("\n")[0].split()
        if len(fields) < 9 or fields[0] != "cpu":
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[1:9])
        return (user + nice + system + irq + softirq) / self._ticks_per_s, steal / self._ticks_per_s

    def process_cpu_seconds(self, pid: int) -> float:
        """CPU seconds of one process, all threads."""
        fields = read(self._path(f"proc/{pid}/stat")).rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / self._ticks_per_s if len(fields) > 12 else 0.0

    def sample(self) -> dict[str, Any]:
        """The readings that change while a benchmark runs."""
        load = read(self._path("proc/loadavg")).split()
        return {
            "load_average": float(load[0]) if load else None,
            "clock_hz": [1000 * khz for khz in (number(read(path)) for path in self._clocks) if khz is not None],
            "temperature_c": self.temperatures(),
        }

    def temperatures(self) -> dict[str, float]:
        """Degrees by zone, of the zones that are switched on."""
        found = {}
        for zone in self._zones:
            milli = number(read(os.path.join(zone, "temp")))
            if milli is not None:
                found[read(os.path.join(zone, "type")) or os.path.basename(zone)] = milli / 1000
        return found

    def facts(self) -> dict[str, Any]:
        """The readings that do not change: what machine this is."""
        cpu = dict(line.split(":", 1) for line in read(self._path("proc/cpuinfo")).split("\n") if ":" in line)
        cpu = {key.strip(): value.strip() for key, value in cpu.items()}
        release = dict(line.split("=", 1) for line in read(self._path("etc/os-release")).split("\n") if "=" in line)
        memory = read(self._path("proc/meminfo")).split()
        policies = sorted(glob.glob(self._path("sys/devices/system/cpu/cpufreq/policy*")))
        governors = [read(os.path.join(policy, "scaling_governor")) for policy in policies]
        highest = [number(read(os.path.join(policy, "cpuinfo_max_freq"))) for policy in policies]
        return {
            "model": self._model(),
            "machine": platform.machine(),
            "cpu": cpu.get("model name") or cpu.get("Hardware") or cpu.get("CPU part") or platform.processor(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": 1024 * int(memory[1]) if len(memory) > 1 else None,
            "os": release.get("PRETTY_NAME", "").strip('"') or platform.system(),
            "kernel": platform.release(),
            "virtual": "hypervisor" in cpu.get("flags", "").split(),
            "governors": sorted({governor for governor in governors if governor}),
            "max_clock_hz": max((1000 * khz for khz in highest if khz), default=None),
        }

    def _model(self) -> str:
        names = ("sys/firmware/devicetree/base/model", "sys/class/dmi/id/product_name", "sys/class/dmi/id/board_name")
        return next((text for text in (read(self._path(name)) for name in names) if text), "")


def facts() -> dict[str, Any]:
    """What machine this is and how it is doing right now."""
    try:
        import numpy

        numpy_version = numpy.__version__
    except ImportError:
        numpy_version = None
    sensors = Sensors()
    python = {"python": platform.python_version(), "numpy": numpy_version, "agent": VERSION}
    return dict(sensors.facts(), **python, now=sensors.sample())
