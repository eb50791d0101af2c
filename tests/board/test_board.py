"""A real remote aarch64 machine, emulated: everything but its times is a board's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import board_files
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from waiting import wait_until

from edgekd import backends, registry
from edgekd.backends import Engine
from edgekd.backends.null import Null
from edgekd.bench import MIN_LAUNCHES, benchmark
from edgekd.bench.modes.single_stream import SingleStream
from edgekd.device import Device, bootstrap, ssh
from edgekd.errors import ConnectionLost, DiskFull, MissingError
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification

pytestmark = [pytest.mark.board, pytest.mark.slow, pytest.mark.timeout(900)]
# Sums in another order than on x86: some units in the last place of float32.
TOLERANCE = 1e-5


def network(path, width):
    """conv 3x3 (3 to `width` channels), ReLU, mean over the image, 5 classes; images are 8x8."""
    rng = np.random.default_rng(0)
    weights = {
        "kernel": rng.standard_normal((width, 3, 3, 3)).astype(np.float32),
        "matrix": rng.standard_normal((width, 5)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["convolved"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["convolved"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    backend = registry.create("backend", "onnxruntime")
    found = []
    for name, width in (("student", 4), ("teacher", 16)):
        (folder / name).mkdir()
        backend.compile(network(folder / f"{name}.onnx", width), folder / name, threads=1)
        found.append(Engine(name, folder / name, backend.runner, backend.name))
    return found


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(1)
    return rng.standard_normal((40, 3, 8, 8)).astype(np.float32), rng.integers(5, size=40)


def null_engine(folder):
    folder.mkdir()
    settings = {"backend": "null", "threads": 1, "image": [3, 8, 8], "answer": [5], "latency_ms": 1.0}
    backends.write_settings(folder, settings)
    return Engine(folder.name, folder, Null.runner, "null")


def measure(board, engines, samples, folder, **options):
    return benchmark(
        *engines, samples=samples[0], judge=Judge(Classification(), samples[1], (5,)), device=Device(board.url, folder),
        workdir=folder / "work", mode=SingleStream(seconds=0.5), launches=MIN_LAUNCHES,
        **options,
    )  # fmt: skip


def test_the_board_says_what_it_is(board, tmp_path):
    facts = Device(board.url, tmp_path).facts()
    assert facts["model"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert (facts["machine"], facts["soc"], facts["emulated"]) == ("aarch64", "brcm,bcm2712", True)
    assert facts["runtimes"]["onnxruntime"]
    assert facts["governors"] == ["ondemand"]
    assert facts["now"]["temperature_c"] == {"cpu-thermal": 55.4}
    rows = {one.what: one for one in bootstrap.findings(facts, ["numpy", "onnxruntime"], "mend it")}
    assert "emulated: no time measured there is a board's" in rows["processor"].found
    assert rows["board"].found == "Raspberry Pi 5 Model B Rev 1.0 (brcm,bcm2712)"
    assert rows["onnxruntime"].fix == ""


def test_a_benchmark_answers_as_here_and_says_that_its_times_are_not_a_boards(board, engines, samples, tmp_path):
    (board.kernel / "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled").write_text("1\n")
    result = measure(board, engines, samples, tmp_path)
    for engine in engines:
        there = np.load(tmp_path / f"work/{engine.name}_logits.npy")
        run = backends.load_runner(engine).run
        here = np.concatenate([run(x[None]) for x in samples[0]])
        np.testing.assert_allclose(there, here, rtol=TOLERANCE, atol=TOLERANCE)
        assert result["accuracy"][engine.name]["score"] == (here.argmax(axis=1) == samples[1]).mean()
    assert result["status"] == "INVALID"
    assert "emulated: aarch64 is emulated there, its times are not a board's" in result["reasons"]
    assert "throttled: the supply voltage was too low: use the board's own power supply" in result["reasons"]
    assert result["device"]["emulated"]
    assert result["telemetry"]["series"]["cpu-thermal_c"][0] == 55.4


def test_a_board_that_restarts_goes_on_with_the_benchmark(board, samples, tmp_path):
    engines = [null_engine(tmp_path / name) for name in ("student", "teacher")]

    def restart():
        if wait_until(lambda: list(board.home().glob(".edgekd/jobs/job-*/launch_1.json")), 300):
            board.power("cut")
            board.power("back")

    plug = threading.Thread(target=restart)
    plug.start()
    result = measure(board, engines, samples, tmp_path)
    plug.join()
    assert result["interruptions"] == 1
    assert len(result["speedup_by_launch"]) == MIN_LAUNCHES
    assert not list(board.home().glob(".edgekd/jobs/job-*/launch_*"))


@pytest.mark.parametrize(("fault", "mended", "after_s"), [("silence", "heal", 20), ("cut", "back", 0)])
def test_an_upload_that_a_pulled_cable_or_a_restart_interrupts_goes_on(board, tmp_path, caplog, fault, mended, after_s):
    caplog.set_level("INFO")
    (tmp_path / "engine").write_bytes(os.urandom(30_000_000))

    def pull():
        parts = board.home() / ".edgekd/files"
        if wait_until(lambda: sum(part.stat().st_size for part in parts.glob("*.part")) > 3_000_000, 300):
            board.power(fault)
            time.sleep(after_s)
            board.power(mended)

    hand = threading.Thread(target=pull)
    hand.start()
    device = Device(board.url, tmp_path)
    with device.job() as job:
        job.put({"engine": tmp_path / "engine"})
        hand.join()
        job.get("engine", tmp_path / "back", limit_bytes=1 << 30)
    assert (tmp_path / "back").read_bytes() == (tmp_path / "engine").read_bytes()
    said = "\n".join(record.message for record in caplog.records)
    kept = int(re.search(r"\d+ bytes sent, (\d+) were there", said)[1])
    assert "the connection was lost" in said
    assert kept >= 3_000_000


HOST = """
import sys
from pathlib import Path
from types import SimpleNamespace
sys.path[:0] = sys.argv[1:3]
import numpy as np
from test_board import measure, null_engine
folder = Path(sys.argv[4])
engines = [null_engine(folder / name) for name in ("student", "teacher")]
samples = np.zeros((40, 3, 8, 8), np.float32), np.zeros(40, int)
measure(SimpleNamespace(url=sys.argv[3]), engines, samples, folder, lock_clocks=True)
"""


def test_a_host_that_is_killed_leaves_no_process_and_no_locked_clock(board, tmp_path):
    """SIGKILL: nobody on the host can ask for anything any more."""
    files = [
        board.kernel / f"{board_files.CPUFREQ}policy0/scaling_{name}" for name in ("governor", "min_freq", "max_freq")
    ]
    before = [file.read_text() for file in files]
    for file in files:
        file.chmod(0o666)  # as if pi were root
    argv = [
        sys.executable,
        "-c",
        HOST,
        str(Path(__file__).parent),
        str(Path(__file__).parents[1]),
        board.url,
        str(tmp_path),
    ]
    try:
        with subprocess.Popen(argv) as host:
            assert wait_until(lambda: files[0].read_text() == "performance" or host.poll() is not None, 300)
            assert [file.read_text() for file in files] != before
            host.send_signal(signal.SIGKILL)
        assert wait_until(
            lambda: [file.read_text().strip() for file in files] == [text.strip() for text in before], 300
        )
    finally:
        for file in files:
            file.chmod(0o644)
    device = Device(board.url, tmp_path)
    assert device.transport.holder() == {}
    with device.job() as job:
        left = job.run(["pgrep", "-f", "agent (bench|work|restore)"], timeout=60)
    assert (left.status, left.stdout) == (1, "")


def test_a_board_that_is_gone_is_a_clear_error(board, tmp_path, monkeypatch):
    monkeypatch.setattr(ssh, "RECONNECT_S", 1.0)
    device = Device(board.url, tmp_path)
    with pytest.raises(ConnectionLost, match="the connection was lost"), device.job() as job:
        board.power("cut")
        job.run(["true"], timeout=60)


def test_a_full_disk_is_a_clear_error(board, tmp_path):
    (tmp_path / "engine").write_bytes(os.urandom(5_000_000))
    device = Device(board.url, tmp_path)
    with device.job() as job:
        board.power("fill", 1_000_000)
        with pytest.raises(DiskFull, match=r"its disk is full: [01]\.\d MB free, 10\.0 MB needed") as caught:
            job.put({"engine": tmp_path / "engine"})
        board.power("empty")
        job.put({"engine": tmp_path / "engine"})
    assert caught.value.allowed == "below /home/pi/.edgekd"
    assert "rm -r ~/.edgekd/files" in caught.value.fix


def test_a_board_without_a_network_gets_packages_all_the_same(board, tmp_path):
    try:
        bootstrap.install(Device(board.url, tmp_path), ["markupsafe"])
    except MissingError as error:
        pytest.skip(f"no package index can be reached from here: {error.what}")
    device = Device(board.url, tmp_path)
    with device.job() as job:
        try:
            assert job.python == "/home/pi/.edgekd/venv/bin/python"
            argv = [job.python, "-c", "import markupsafe._speedups as it; print(it.__file__)"]
            assert "aarch64" in job.run(argv, timeout=300).stdout
        finally:
            job.run(["rm", "-r", "/home/pi/.edgekd/venv"], timeout=300)
