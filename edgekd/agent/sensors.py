"""How this machine is doing: the kernel's own files, read so that nothing they do can hurt."""

from __future__ import annotations

import glob
import os
from typing import Any

# How the kernels of Jetsons and other boards call the GPU's frequency control, and where a Jetson says how busy it is.
GPUS = ("*gpu*", "*.gp10b", "*.gv11b", "*.ga10b")
GPU_LOADS = ("sys/devices/platform/gpu.0/load", "sys/devices/platform/bus@0/*.gpu/load", "sys/devices/gpu.0/load")


def gpus(root: str) -> list[str]:
    """The folders of the frequency controls of GPUs."""
    return sorted(found for name in GPUS for found in glob.glob(os.path.join(root, "sys/class/devfreq", name)))


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
        self._gpu_clocks = [os.path.join(gpu, "cur_freq") for gpu in gpus(root)]
        self._gpu_loads = [path for name in GPU_LOADS for path in sorted(glob.glob(self._path(name)))]
        # A Raspberry Pi's flags; an Intel processor counts.
        self._flags = sorted(glob.glob(self._path("sys/devices/platform/soc*/*firmware/get_throttled")))[:1]
        self._counts = sorted(glob.glob(self._path("sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count")))

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
            "gpu_clock_hz": max(filter(None, (number(read(path)) for path in self._gpu_clocks)), default=None),
            "gpu_load": self.gpu_load(),
            "temperature_c": self.temperatures(),
            "throttled": self.throttled(),
            "throttle_count": sum(filter(None, (number(read(path)) for path in self._counts))),
        }

    def gpu_load(self) -> float | None:
        """The share of its time that the GPU has just been busy."""
        thousandths = [value for value in (number(read(path)) for path in self._gpu_loads) if value is not None]
        return thousandths[0] / 1000 if thousandths else None

    def throttled(self) -> int | None:
        """The flags of a Raspberry Pi's firmware. Now: 1 under-voltage, 2 capped, 4 throttled, 8 soft limit of the
        temperature; 16 bits higher: since it was switched on."""
        try:
            return int(read(self._flags[0]), 16) if self._flags else None
        except ValueError:
            return None

    def temperatures(self) -> dict[str, float]:
        """Degrees by zone, of the zones that are switched on."""
        found = {}
        for zone in self._zones:
            milli = number(read(os.path.join(zone, "temp")))
            if milli is not None:
                found[read(os.path.join(zone, "type")) or os.path.basename(zone)] = milli / 1000
        return found
