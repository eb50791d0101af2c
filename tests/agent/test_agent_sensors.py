"""What the agent reads of a machine: laid out as files, as its kernel would."""

from __future__ import annotations

import os
import platform

import board_files
import pytest

from edgekd.agent import machine
from edgekd.agent.machine import emulated, facts
from edgekd.agent.sensors import Sensors, number, read


@pytest.fixture
def raspberry_pi(tmp_path):
    return board_files.write(tmp_path, board_files.RASPBERRY_PI_4)


def test_facts_of_a_raspberry_pi(raspberry_pi):
    found = facts(str(raspberry_pi))
    assert found["model"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert found["soc"] == "brcm,bcm2711"
    assert found["cpu"] == "0xd08"
    assert found["governors"] == ["ondemand"]
    assert found["max_clock_hz"] == 1_800_000_000
    assert (found["memory_bytes"], found["memory_available_bytes"]) == (3884364 * 1024, 3000000 * 1024)
    assert found["os"] == "Debian GNU/Linux 12 (bookworm)"
    assert (found["virtual"], found["emulated"]) == (False, False)
    assert (found["l4t"], found["power_mode"], found["tensorrt"], found["rails"]) == ("", "", "", [])
    assert found["now"]["throttled"] == 0x50005


def test_facts_of_a_jetson(tmp_path):
    root = board_files.write(tmp_path, board_files.JETSON_ORIN_NANO)
    header = (
        "#define NV_TENSORRT_MAJOR 10 //!< major\n#define NV_TENSORRT_MINOR 3 //!<\n#define NV_TENSORRT_PATCH 0 //!<\n"
    )
    board_files.write(root, {"usr/include/aarch64-linux-gnu/NvInferVersion.h": header})
    board_files.write(root, {"usr/src/tensorrt/bin/trtexec": "#!/bin/sh\n"})
    (root / "usr/src/tensorrt/bin/trtexec").chmod(0o755)
    found = facts(str(root))
    assert (found["soc"], found["l4t"], found["power_mode"]) == ("nvidia,tegra234", "36.4.3", "MAXN_SUPER")
    assert (found["tensorrt"], found["trtexec"]) == ("10.3.0", str(root / "usr/src/tensorrt/bin/trtexec"))
    assert found["rails"] == ["VDD_IN (ina3221)", "VDD_CPU_GPU_CV (ina3221)", "VDD_SOC (ina3221)"]
    assert "cv0-thermal" not in found["now"]["temperature_c"]  # switched off


def test_readings_of_a_raspberry_pi(raspberry_pi):
    sensors = Sensors(str(raspberry_pi))
    ticks = os.sysconf("SC_CLK_TCK")
    assert sensors.sample() == {
        "load_average": 0.25,
        "clock_hz": [1_500_000_000],
        "gpu_clock_hz": None,
        "gpu_load": None,
        "temperature_c": {"cpu-thermal": 48.312},
        "throttled": 0x50005,
        "throttle_count": 0,
    }
    assert sensors.cpu_seconds() == (1650 / ticks, 40 / ticks)
    assert sensors.process_cpu_seconds(42) == 300 / ticks
    assert sensors.process_cpu_seconds(43) == 0


@pytest.mark.parametrize(
    ("files", "clock_hz", "load"),
    [
        (board_files.JETSON_ORIN_NANO, 1_020_000_000, 0.999),
        # As JetPack 5 and 4 call it, and a board that does not say how busy it is.
        ({"sys/class/devfreq/17000000.ga10b/cur_freq": "624750000"}, 624_750_000, None),
        ({"sys/class/devfreq/57000000.gpu/cur_freq": "76800000", "sys/devices/gpu.0/load": "0"}, 76_800_000, 0.0),
        ({"sys/class/devfreq/fb000000.gpu/cur_freq": "300000000"}, 300_000_000, None),
    ],
)
def test_what_the_gpu_does(tmp_path, files, clock_hz, load):
    now = Sensors(str(board_files.write(tmp_path, files))).sample()
    assert (now["gpu_clock_hz"], now["gpu_load"]) == (clock_hz, load)


def test_throttling_of_an_intel_processor_is_counted(tmp_path):
    counts = {f"sys/devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count": "3" for core in range(2)}
    assert Sensors(str(board_files.write(tmp_path, counts))).sample()["throttle_count"] == 6


def test_the_firmwares_own_tool_is_asked_where_the_kernel_does_not_say(tmp_path):
    board_files.write(tmp_path, {"usr/bin/vcgencmd": "#!/bin/sh\necho throttled=0x20002\n"})
    (tmp_path / "usr/bin/vcgencmd").chmod(0o755)
    assert facts(str(tmp_path))["now"]["throttled"] == 0x20002


def test_a_zone_that_is_switched_off_is_left_out(raspberry_pi):
    zone = raspberry_pi / "sys/class/thermal/thermal_zone1"
    zone.mkdir()
    (zone / "type").write_text("cv0-thermal\n")
    # Reading it fails with EAGAIN, as on a Jetson Orin Nano: a pipe that is open and empty does the same.
    os.mkfifo(zone / "temp")
    held = os.open(zone / "temp", os.O_RDWR)
    try:
        assert read(str(zone / "temp")) == ""
        assert Sensors(str(raspberry_pi)).temperatures() == {"cpu-thermal": 48.312}
    finally:
        os.close(held)


def test_a_machine_that_tells_nothing_is_not_an_error(tmp_path):
    sensors = Sensors(str(tmp_path))
    nothing = {
        "load_average": None,
        "clock_hz": [],
        "gpu_clock_hz": None,
        "gpu_load": None,
        "temperature_c": {},
        "throttled": None,
        "throttle_count": 0,
    }
    assert sensors.sample() == nothing
    assert sensors.cpu_seconds() is None
    found = facts(str(tmp_path))
    assert (found["model"], found["memory_bytes"], found["max_clock_hz"], found["governors"]) == ("", None, None, [])


@pytest.mark.parametrize(("text", "value"), [("42", 42), ("", None), ("<unsupported>", None), ("-256000", -256000)])
def test_number(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    ("program", "kernel", "found"),
    [
        ("aarch64", "x86_64", True),
        ("aarch64", "aarch64", False),
        ("armv7l", "aarch64", False),  # the 32-bit system of a Raspberry Pi
        ("x86_64", "x86_64", False),
        ("riscv64", "riscv64", False),
    ],
)
def test_an_emulated_machine_is_told_by_its_kernel(tmp_path, monkeypatch, program, kernel, found):
    monkeypatch.setattr(platform, "machine", lambda: program)
    assert emulated(str(board_files.write(tmp_path, {"proc/sys/kernel/arch": kernel}))) is found


def test_an_older_kernel_tells_it_by_the_parents_command_line(tmp_path):
    line = f"proc/{os.getppid()}/cmdline"
    assert emulated(str(board_files.write(tmp_path, {line: "/usr/bin/qemu-aarch64-static\0/usr/sbin/sshd\0"})))
    assert not emulated(str(board_files.write(tmp_path, {line: "/usr/sbin/sshd\0-D\0"})))


def test_this_machine_is_not_emulated():
    assert not machine.emulated()
