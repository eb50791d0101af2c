"""What the kernel's files say on some boards, as far as edgekd reads them: to test against, and for the stand-in board.

Values are those of published transcripts of the boards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CPUFREQ = "sys/devices/system/cpu/cpufreq/"
ARM_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


def arm_cpuinfo(part: int, cores: int, tail: str = "") -> str:
    core = (
        "processor\t: {}\nBogoMIPS\t: 108.00\nFeatures\t: {}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
        "CPU variant\t: 0x4\nCPU part\t: {:#x}\nCPU revision\t: 1\n\n"
    )
    return "".join(core.format(index, ARM_FEATURES, part) for index in range(cores)) + tail


def clocks(policy: int, governor: str, current: int, lowest: int, highest: int) -> dict[str, str]:
    """kHz."""
    folder = f"{CPUFREQ}policy{policy}/"
    return {
        f"{folder}scaling_governor": governor,
        f"{folder}scaling_available_governors": "ondemand powersave performance schedutil ",
        f"{folder}scaling_cur_freq": str(current),
        f"{folder}scaling_min_freq": str(lowest),
        f"{folder}scaling_max_freq": str(highest),
        f"{folder}cpuinfo_min_freq": str(lowest),
        f"{folder}cpuinfo_max_freq": str(highest),
    }


def zones(**by_name: int | None) -> dict[str, str]:
    """Thousandths of a degree; an empty file where a zone is switched off."""
    files = {}
    for index, (name, milli) in enumerate(by_name.items()):
        files[f"sys/class/thermal/thermal_zone{index}/type"] = name.replace("_", "-")
        files[f"sys/class/thermal/thermal_zone{index}/temp"] = "" if milli is None else str(milli)
    return files


def device_tree(model: str, *compatible: str) -> dict[str, str]:
    folder = "sys/firmware/devicetree/base/"
    return {f"{folder}model": f"{model}\0", f"{folder}compatible": "\0".join(compatible) + "\0"}


RASPBERRY_PI_5 = {
    **device_tree("Raspberry Pi 5 Model B Rev 1.0", "raspberrypi,5-model-b", "brcm,bcm2712"),
    **zones(cpu_thermal=55400),
    **clocks(0, "ondemand", 2_400_000, 1_500_000, 2_400_000),
    "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "0",
    **{f"sys/devices/system/cpu/{name}": "0-3" for name in ("online", "possible", "present")},
    "proc/cpuinfo": arm_cpuinfo(0xD0B, 4, "Revision\t: d04170\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"),
}
RASPBERRY_PI_4 = {
    **device_tree("Raspberry Pi 4 Model B Rev 1.4", "raspberrypi,4-model-b", "brcm,bcm2711"),
    **zones(cpu_thermal=48312),
    **clocks(0, "ondemand", 1_500_000, 600_000, 1_800_000),
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005",
    "proc/cpuinfo": arm_cpuinfo(0xD08, 4),
    "proc/meminfo": "MemTotal:        3884364 kB\nMemFree: 1 kB\nMemAvailable:    3000000 kB\n",
    "proc/loadavg": "0.25 0.20 0.10 1/200 1234",
    "proc/stat": "cpu  1000 100 500 9000 50 20 30 40 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n",
    "proc/42/stat": "42 (a (b) c) S 1 42 42 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 1 0 1 1 1",
    "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
}
INA3221 = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/"
GPU = "sys/class/devfreq/17000000.gpu/"
JETSON_ORIN_NANO = {
    **device_tree(
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "nvidia,p3767-0005", "nvidia,tegra234"
    ),
    **zones(cpu_thermal=51125, gpu_thermal=50468, cv0_thermal=None, soc0_thermal=49250, tj_thermal=51125),
    **clocks(0, "schedutil", 729_600, 115_200, 1_510_400),
    **clocks(4, "schedutil", 1_510_400, 115_200, 1_510_400),
    **{f"{INA3221}in{index}_label": rail for index, rail in enumerate(("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"), 1)},
    **{f"{INA3221}in{index}_input": str(mv) for index, mv in enumerate((4968, 4960, 4960), 1)},
    **{f"{INA3221}curr{index}_input": str(ma) for index, ma in enumerate((1520, 1784, 496), 1)},
    **{f"{GPU}{name}_freq": hz for name, hz in (("cur", "1020000000"), ("min", "306000000"), ("max", "1020000000"))},
    "sys/devices/platform/bus@0/17000000.gpu/load": "999",
    f"{INA3221}in7_label": "sum of shunt voltages",
    f"{INA3221}in7_input": "0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "var/lib/nvpmodel/status": "pmode:0002",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n...\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "proc/cpuinfo": arm_cpuinfo(0xD42, 6),
}
# The first Jetson Nano: its old kernel's driver, and a current that has to be looked up by another name.
JETSON_NANO = {
    **device_tree("NVIDIA Jetson Nano Developer Kit", "nvidia,jetson-nano", "nvidia,tegra210"),
    **{
        f"sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/{name}": value
        for index, (rail, mw) in enumerate((("POM_5V_IN", 1992), ("POM_5V_GPU", 40), ("POM_5V_CPU", 396)))
        for name, value in ((f"rail_name_{index}", rail), (f"in_power{index}_input", str(mw)))
    },
    **zones(CPU_therm=33500, PMIC_Die=100000),
}
THOR_VIN = "sys/bus/i2c/drivers/ina238/2-0044/hwmon/hwmon5/"
JETSON_AGX_THOR = {
    **device_tree("NVIDIA Jetson AGX Thor Developer Kit", "nvidia,p4071-0000+p3834-0008", "nvidia,tegra264"),
    f"{THOR_VIN}name": "ina238",
    f"{THOR_VIN}in1_input": "19620",
    f"{THOR_VIN}curr1_input": "1610",
    f"{THOR_VIN}power1_input": "31588200",
}
RAPL_MACHINE = {
    **zones(x86_pkg_temp=46000),
    **{
        f"sys/class/powercap/{zone}/{name}": value
        for zone, rail, energy in (("intel-rapl:0", "package-0", 240_422_366_267), ("intel-rapl:0:0", "core", 1))
        for name, value in (
            ("name", rail),
            ("energy_uj", str(energy)),
            ("max_energy_range_uj", "262143328850"),
        )
    },
}


def write(root: Path, files: Mapping[str, str]) -> Path:
    """Lay the files out below `root`; sysfs ends its texts with a newline."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text if text.endswith(("\0", "\n")) or not text else f"{text}\n")
    return root
