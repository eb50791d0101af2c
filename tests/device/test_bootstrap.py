"""What doctor says of a device, and the installation on one that has nothing yet."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import board_files
import pytest
import small_disk

from edgekd import catalog
from edgekd import target as targets
from edgekd.agent.machine import facts
from edgekd.device import Device, bootstrap
from edgekd.errors import DiskFull, MissingError

URL = "ssh://pi@board"
INSTALL = "edgekd doctor --device ssh://pi@board --install"
NOTHING = {"runtimes": {}, "numpy": None, "disk_free_bytes": 5e9, "libc": "glibc 2.36"}


def found(root, packages=("numpy", "onnxruntime"), **changes):
    known = {**facts(str(root)), **NOTHING, **changes}
    return {one.what: one for one in bootstrap.findings(known, packages, bootstrap.install_command(URL, packages))}


def test_a_raspberry_pi(tmp_path):
    root = board_files.write(tmp_path, board_files.RASPBERRY_PI_4 | {"proc/loadavg": "9.00 0.20 0.10 1/200 1234"})
    rows = found(root, cores=4)
    assert rows["board"].found == "Raspberry Pi 4 Model B Rev 1.4 (brcm,bcm2711)"
    assert (rows["governor"].found, rows["governor"].fix) == ("ondemand", bootstrap.SET_GOVERNOR)
    assert rows["clock"].found == "1500 of 1800 MHz"
    assert rows["temperature"].found == "cpu-thermal 48 °C"
    assert rows["memory"].found == "3.1 of 4.0 GB available"
    assert rows["throttling"].found == "now (0x50005)"
    assert rows["throttling"].fix == "cool the board, and use its own power supply"
    assert (rows["load"].found, rows["load"].fix) == ("9.00", "stop what else runs there: top")
    assert (rows["numpy"].found, rows["numpy"].fix) == ("not installed", INSTALL)
    assert (rows["onnxruntime"].found, rows["onnxruntime"].fix) == ("not installed", INSTALL)
    assert "tensorrt" not in rows


def test_a_jetson(tmp_path):
    rows = found(board_files.write(tmp_path, board_files.JETSON_ORIN_NANO))
    assert ", L4T 36.4.3, " in rows["system"].found
    assert rows["power mode"].found == "MAXN_SUPER"
    assert (rows["tensorrt"].found, rows["tensorrt"].fix) == ("not found", "sudo apt-get install tensorrt")
    assert (rows["trtexec"].found, rows["trtexec"].fix) == ("not found", "sudo apt-get install libnvinfer-bin")
    assert rows["power sensors"].found.startswith("VDD_IN (ina3221), ")
    assert rows["processor"].fix == ""


def test_a_device_where_all_is_well(tmp_path):
    files = board_files.RASPBERRY_PI_5 | board_files.clocks(0, "performance", 2_400_000, 1_500_000, 2_400_000)
    rows = found(
        board_files.write(tmp_path, files), runtimes={"numpy": "2.1", "onnxruntime-gpu": "1.20", "ncnn": "1.0"}
    )
    assert [row for row in rows.values() if row.fix] == []
    assert (rows["onnxruntime"].found, rows["ncnn"].found) == ("1.20", "1.0")
    assert rows["throttling"].found == "none since it was switched on"


@pytest.mark.parametrize(
    ("change", "what", "text", "fix"),
    [
        ({"disk_free_bytes": 1e8}, "disk", "0.1 GB free", "free some space there"),
        ({"emulated": True}, "processor", "emulated: no time measured there is a board's", ""),
        ({"libc": ""}, "system", "no glibc", ""),
    ],
)
def test_what_else_may_be_wrong(tmp_path, change, what, text, fix):
    row = found(tmp_path, **change)[what]
    assert text in row.found
    assert row.fix == fix


def test_only_what_shall_run_there_must_be_there(tmp_path):
    rows = found(tmp_path, packages=["numpy"], runtimes={"numpy": "2.1", "onnxruntime": "1.20"})
    assert [row for row in rows.values() if row.what in ("numpy", "onnxruntime") and row.fix] == []
    assert rows["onnxruntime"].found == "1.20"


@pytest.mark.parametrize(
    ("target", "backend", "packages"),
    [
        ("raspberry-pi-5", None, ["numpy", "onnxruntime"]),  # TVM's runtime travels with the engine
        ("raspberry-pi-5", "tvm", ["numpy"]),
        ("raspberry-pi-5", "openvino", ["numpy", "openvino"]),
        ("jetson", None, ["numpy"]),  # TensorRT is a Debian package
    ],
)
def test_what_a_targets_backends_need(target, backend, packages):
    assert catalog.device_packages(targets.load(target, backend)) == packages


def test_a_board_is_told_what_brings_what_it_lacks(sshd, main):
    """An interpreter of its own, which has numpy and no OpenVINO."""
    url = sshd.url(python=sys.executable)
    code, out, err = main("doctor", "--device", url, "--target", "raspberry-pi-5", "--backend", "null", "--json")
    rows = {row["what"]: row for row in json.loads(out)}
    assert code == 0, err
    assert rows[f"{url} numpy"]["fix"] == ""
    assert bootstrap.install_command(url, ["numpy"], ["--backend", "openvino"]) == (
        f"edgekd doctor --device '{url}' --backend openvino --install"
    )
    assert bootstrap.install_command("local:", ["numpy", "openvino"]) == "pip install numpy openvino"


def test_nothing_is_installed_into_our_own_environment(tmp_path):
    with pytest.raises(MissingError) as caught:
        bootstrap.install(Device("local:", tmp_path), ["numpy"])
    assert caught.value.what == "edgekd does not install into the environment that it runs in"
    assert caught.value.fix == "pip install 'edgekd[train]'"


@pytest.mark.parametrize("change", [{"libc": ""}, {"machine": "mips"}])
def test_a_system_that_no_wheels_are_made_for_is_a_clear_error(sshd, tmp_path, monkeypatch, change):
    device = Device(sshd.url(), tmp_path)
    known = device.facts()
    monkeypatch.setattr(device, "facts", lambda: {**known, **change})
    with pytest.raises(MissingError) as caught:
        bootstrap.install(device, ["numpy", "onnxruntime"])
    assert caught.value.what.startswith(f'device "{device.url}": no wheels of numpy, onnxruntime for Python 3.')
    assert "there are wheels for Linux with glibc only" in caught.value.allowed
    assert caught.value.fix.endswith("or use a 64-bit system on the board")


def test_a_board_without_room_for_what_shall_be_installed(sshd, tmp_path, monkeypatch):
    def download(facts, packages, folder, url):
        with zipfile.ZipFile(folder / "numpy-2.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr("numpy.so", bytes(20_000_000))
        return "pip.whl"

    monkeypatch.setattr(bootstrap, "_download", download)
    device = Device(sshd.url(python=sys.executable), tmp_path)
    with small_disk.mounted(sshd.home / ".edgekd", "10m"), pytest.raises(DiskFull) as caught:
        bootstrap.install(device, ["numpy"])
    assert re.fullmatch(
        rf'device "{re.escape(device.url)}": its disk is full: \d+\.\d MB free, 20\.\d MB needed', caught.value.what
    )
    assert caught.value.allowed == "below ~/.edgekd"


def test_wheels_that_an_earlier_attempt_has_sent_need_no_room_of_their_own(sshd, tmp_path):
    device = Device(sshd.url(python=sys.executable), tmp_path)
    with zipfile.ZipFile(tmp_path / "numpy-2.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("numpy.so", os.urandom(500_000))
        wheel.writestr("numpy.py", os.urandom(250_000))  # pip makes bytecode of it
    with pytest.raises(DiskFull, match=r": 2\.0 MB free, 2\.5 MB needed"):
        bootstrap._check_room(tmp_path, 2_000_000, device)
    with device.job() as job:
        job.put({"wheels": tmp_path})
    bootstrap._check_room(tmp_path, 2_000_000, device)
    with pytest.raises(DiskFull, match=r": 1\.0 MB free, 1\.8 MB needed"):
        bootstrap._check_room(tmp_path, 1_000_000, device)


def test_a_disk_that_is_filled_while_pip_installs(sshd, tmp_path, monkeypatch):
    words = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"

    def download(facts, packages, folder, url):
        with zipfile.ZipFile(folder / "pip.whl", "w") as wheel:
            wheel.writestr("pip/__main__.py", f"import sys; sys.exit({words!r})")
        return "pip.whl"

    monkeypatch.setattr(bootstrap, "_download", download)
    device = Device(sshd.url(python=sys.executable), tmp_path)
    try:
        with pytest.raises(DiskFull) as caught:
            bootstrap.install(device, ["numpy"])
    finally:
        shutil.rmtree(sshd.home / ".edgekd/venv", ignore_errors=True)
    assert caught.value.what == f'installing on "{device.url}" failed: its disk is full'
    assert words in caught.value.allowed
    assert caught.value.fix.startswith("free some space there (what edgekd keeps of earlier runs: rm -r ~/.edgekd")


@pytest.mark.parametrize(
    ("url", "made"),
    [
        ("ssh://board?python=/usr/bin/python3.8", "ssh://board"),
        ("ssh://board?config=c&python=p&signing_key=k", "ssh://board?config=c&signing_key=k"),
        ("ssh://board", "ssh://board"),
    ],
)
def test_what_was_installed_is_not_looked_for_in_a_python_that_the_url_names(url, made):
    assert bootstrap.installed_url(url) == made


def test_a_package_that_does_not_exist_shows_what_pip_says(sshd, tmp_path):
    with pytest.raises(MissingError) as caught:
        bootstrap.install(Device(sshd.url(), tmp_path), ["edgekd-there-is-no-such-package"])
    assert "edgekd-there-is-no-such-package" in caught.value.allowed


@pytest.fixture(scope="module")
def package_index(tmp_path_factory):
    argv = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        tmp_path_factory.mktemp("pip"),
        "pip",
    ]
    if subprocess.run(argv, capture_output=True, check=False).returncode:
        pytest.skip("no package index can be reached from here")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("python", "libc", "tag"), [("3.8.10", "glibc 2.31", "cp38"), ("3.11.2", "glibc 2.36", "cp311")]
)
def test_the_wheels_are_those_of_the_board(package_index, tmp_path, python, libc, tag):
    known = {"machine": "aarch64", "python": python, "libc": libc}
    pip = bootstrap._download(known, ["numpy"], tmp_path, URL)
    numpy, found = sorted(file.name for file in tmp_path.iterdir())
    assert pip == found
    assert f"-{tag}-" in numpy
    assert numpy.endswith("_aarch64.whl")


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "module"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_a_board_without_a_runtime_gets_it_without_a_network(package_index, sshd, main, monkeypatch, backend, module):
    """By its own Python's virtual environment; pip there is told of no index, and can reach none."""
    try:
        for _ in range(2):  # the second time into the same environment
            code, out, err = main("doctor", "--device", sshd.url(), "--backend", backend, "--install", "--json")
            rows = {row["what"].partition("?")[2].rpartition(" ")[2]: row for row in json.loads(out)}
            assert code == 0, err
            assert rows["python"]["found"].endswith(f", {sshd.home}/.edgekd/venv/bin/python")
            assert rows["numpy"]["found"][0].isdigit() and rows[module]["found"][0].isdigit()
            assert not rows[module]["fix"]
    finally:
        shutil.rmtree(sshd.home / ".edgekd/venv", ignore_errors=True)
