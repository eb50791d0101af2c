"""Boards by their files, and trtexec by what it prints; the texts are made up in the formats that boards write."""

from __future__ import annotations

import json

import pytest

from edgekd.backends.tensorrt.on_device import board as boards
from edgekd.backends.tensorrt.on_device import trtexec
from edgekd.backends.tensorrt.on_device.build import SETTINGS

ORIN = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Wed\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "etc/nvpmodel.conf": "# no mode\n< POWER_MODEL ID=0 NAME=15W >\nCPU 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n",
    "var/lib/dpkg/status": (
        "Package: libnvinfer10\nStatus: install ok installed\nVersion: 10.3.0.30-1+cuda12.5\nDescription: r\n more\n\n"
        "Package: cuda-cudart-12-6\nStatus: install ok installed\nVersion: 12.6.68-1\n\n"
        "Package: libnvinfer8\nStatus: deinstall ok config-files\nVersion: 8.6.2.3-1+cuda12.2\n"
    ),
}


@pytest.fixture
def root(tmp_path):
    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


def test_an_orin_is_known_by_its_files(root):
    found = boards.board(str(root(ORIN)))
    assert found == {
        "model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit", "soc": "tegra234", "l4t": "36.4.3",
        "jetpack": "6.2", "tensorrt": "10.3.0.30", "cuda": "12.6.68", "power_modes": {0: "15W", 2: "MAXN_SUPER"},
        "power_mode": 2, "trtexec": found["trtexec"],
    }  # fmt: skip


def test_a_machine_that_is_no_jetson_says_nothing(tmp_path):
    found = boards.board(str(tmp_path))
    assert {name for name, value in found.items() if value} <= {"trtexec"}


@pytest.mark.parametrize(
    ("line", "l4t", "jetpack"),
    [
        ("# R32 (release), REVISION: 7.1, GCID: 2", "32.7.1", "4.6.1"),
        ("# R35 (release), REVISION: 4.1, GCID: 2", "35.4.1", "5.1.2"),
        ("# R38 (release), REVISION: 2.0, GCID: 2", "38.2.0", "7.0"),
        ("# R99 (release), REVISION: 2.0, GCID: 2", "99.2.0", None),  # not in the table: by its L4T alone
        ("# R39 (release), REVISION: 2, GCID: 2", "39.2.0", "7.2"),
    ],
)
def test_l4t_is_read_from_its_release_file(root, line, l4t, jetpack):
    found = boards.board(str(root({"etc/nv_tegra_release": line})))
    assert (found["l4t"], found["jetpack"]) == (l4t, jetpack)


def test_l4t_is_read_from_its_package_where_the_file_is_not(root):
    package = "Package: nvidia-l4t-core\nStatus: install ok installed\nVersion: 36.4.7-20250918154033\n"
    assert boards.board(str(root({"var/lib/dpkg/status": package})))["jetpack"] == "6.2.1"


def test_trtexec_is_looked_for_on_the_path_and_where_packages_put_it(root, tmp_path):
    folder = root({"usr/src/tensorrt/bin/trtexec": "#!/bin/sh\n"})
    assert boards.trtexec(str(folder), path="") is None  # not executable
    (folder / "usr/src/tensorrt/bin/trtexec").chmod(0o755)
    assert boards.trtexec(str(folder), path="") == str(folder / "usr/src/tensorrt/bin/trtexec")
    own = root({"own/trtexec": "#!/bin/sh\n"}) / "own"
    (own / "trtexec").chmod(0o755)
    assert boards.trtexec(str(folder), path=str(own)) == str(own / "trtexec")


# ---------------------------------------------------------------- trtexec

PLAIN = {
    **dict.fromkeys(SETTINGS, ""),
    "precision": "int8",
    "workspace_bytes": 512 << 20,
    "optimization_level": 4,
    "dla_core": -1,
}
# What a release's trtexec does not know, and stops at.
UNKNOWN = {
    (8, 5): {
        "--skipInference",
        "--stronglyTyped",
        "--builderOptimizationLevel",
        "--includeDataTransfers",
        "--noSpinWait",
    },
    (8, 6): {"--stronglyTyped", "--includeDataTransfers", "--noCudaGraph", "--noSpinWait"},
    (10, 3): {
        "--buildOnly",
        "--workspace",
        "--explicitBatch",
        "--includeDataTransfers",
        "--noCudaGraph",
        "--noSpinWait",
    },
    (10, 7): {
        "--buildOnly",
        "--workspace",
        "--explicitBatch",
        "--includeDataTransfers",
        "--noCudaGraph",
        "--noSpinWait",
    },
    (10, 13): {
        "--buildOnly",
        "--workspace",
        "--explicitBatch",
        "--includeDataTransfers",
        "--noCudaGraph",
        "--noSpinWait",
    },
    (10, 16): {
        "--buildOnly",
        "--workspace",
        "--explicitBatch",
        "--includeDataTransfers",
        "--noCudaGraph",
        "--noSpinWait",
    },
    (11, 1): {"--buildOnly", "--workspace", "--explicitBatch", "--int8", "--fp16", "--best"},
}


@pytest.mark.parametrize("version", UNKNOWN)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_no_release_is_asked_for_what_it_does_not_know(version, precision):
    settings = {**PLAIN, "precision": precision}
    commands = [trtexec.build_argv("trtexec", version, settings, "images:8x3x32x32")]
    commands += [trtexec.time_argv("trtexec", version, seconds=10, end_to_end=both) for both in (True, False)]
    used = {argument.partition("=")[0] for argv in commands for argument in argv}
    assert not used & UNKNOWN[version]


def test_the_same_engine_is_asked_for_in_each_dialect():
    def asked(version):
        return trtexec.build_argv("trtexec", version, PLAIN, "images:8x3x32x32")

    common = ["--onnx=model.onnx", "--saveEngine=model.plan"]
    level, memory = "--builderOptimizationLevel=4", "--memPoolSize=workspace:512M"
    kept = ["--timingCacheFile=timing.cache", "--profilingVerbosity=detailed", "--exportLayerInfo=layers.json"]
    shapes = ["--minShapes=images:1x3x32x32", "--optShapes=images:1x3x32x32", "--maxShapes=images:8x3x32x32"]
    assert asked((8, 2)) == ["trtexec", *common, "--buildOnly", "--int8", "--fp16", "--workspace=512", *shapes]
    assert asked((8, 5)) == ["trtexec", *common, "--buildOnly", "--int8", "--fp16", memory, *kept, *shapes]
    assert asked((8, 6)) == ["trtexec", *common, "--skipInference", "--int8", "--fp16", memory, level, *kept, *shapes]
    assert asked((10, 3)) == ["trtexec", *common, "--skipInference", "--stronglyTyped", memory, level, *kept, *shapes]
    assert asked((11, 4)) == ["trtexec", *common, "--skipInference", memory, level, *kept, *shapes]


def test_an_accelerator_is_asked_for_with_the_gpu_behind_it():
    argv = trtexec.build_argv("trtexec", (8, 5), {**PLAIN, "dla_core": 1, "workspace_bytes": 0}, "")
    assert argv[-2:] == ["--useDLACore=1", "--allowGPUFallback"]
    assert not any("workspace" in argument or "Shapes" in argument for argument in argv)


def test_kernels_alone_are_the_default_of_11_and_asked_for_before():
    older, newer = (
        trtexec.time_argv("trtexec", version, seconds=3, end_to_end=False) for version in ((10, 3), (11, 0))
    )
    assert older[-3:] == ["--useCudaGraph", "--useSpinWait", "--noDataTransfers"]
    assert newer == older[:-3]
    assert trtexec.time_argv("t", (11, 0), seconds=3, end_to_end=True)[-3:] == [
        "--includeDataTransfers", "--noCudaGraph", "--noSpinWait",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "version"), [("8502", (8, 5, 2)), ("8201", (8, 2, 1)), ("100300", (10, 3, 0)), ("101303", (10, 13, 3))]
)
def test_the_version_is_in_the_first_line(number, version):
    assert trtexec.version_from(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{number}] # trtexec --onnx=m\n") == version


def test_a_program_that_is_no_trtexec_is_found_out():
    with pytest.raises(trtexec.TrtexecError, match="does not say its version:\nhello"):
        trtexec.version_from("hello\n")


LOG = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec --loadEngine=model.plan
[11/21/2026-10:00:00] [V] GPU Compute Time: the GPU latency to execute the kernels for a query.
[11/21/2026-10:00:01] [W] * GPU compute time is unstable, with coefficient of variance = 2.5%.
[11/21/2026-10:00:01] [I] Throughput: 1234.5 qps
[11/21/2026-10:00:01] [I] Latency: min = 0.75 ms, max = 2 ms, mean = 0.8125 ms, median = 0.8 ms, \
percentile(90%) = 0.9 ms, percentile(99%) = 1.5 ms
[11/21/2026-10:00:01] [I] GPU Compute Time: min = 0.5 ms, max = 1e-05 ms, mean = 0.5 ms, median = 0.5 ms
&&&& PASSED TensorRT.trtexec [TensorRT v100300] # trtexec --loadEngine=model.plan
"""


def test_times_are_read_from_what_it_prints():
    assert trtexec.timings_from(LOG) == {
        "warnings": ["GPU compute time is unstable, with coefficient of variance = 2.5%."],
        "throughput_per_s": 1234.5,
        "latency": {"min": 0.75, "max": 2.0, "mean": 0.8125, "median": 0.8, "p90": 0.9, "p99": 1.5},
        "compute": {"min": 0.5, "max": 1e-05, "mean": 0.5, "median": 0.5},
    }


@pytest.fixture
def program(tmp_path):
    """A stand-in that prints what it is told to, and notes how it was called."""

    def write(text, status=0):
        file = tmp_path / "trtexec"
        file.write_text(f'#!/bin/sh\necho "$@" >> calls\ncat <<"END"\n{text}END\nexit {status}\n')
        file.chmod(0o755)
        return str(file)

    return write


def test_it_is_run_three_times_and_every_command_is_kept(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engine.json").write_text(json.dumps({**PLAIN, "profile": ""}))
    (tmp_path / "model.plan").write_bytes(b"engine")
    built = trtexec.Trtexec(program(LOG)).build(str(tmp_path), {"device": "Orin"}, seconds=2)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "--help"
    assert [" ".join(argv[1:]) for argv in built["argv"]] == calls[1:]
    assert built == json.loads((tmp_path / "build.json").read_text())
    assert (built["module"], built["version"], built["refused"]) == ("trtexec", "10.3.0", [])
    assert built["identity"] == {"device": "Orin"} and list(built["files"]) == ["model.plan"]
    assert built["timed"]["kernels_alone"]["latency"]["median"] == 0.8
    assert "--noDataTransfers" in calls[2] and "--noDataTransfers" not in calls[3]


def test_a_build_that_failed_leaves_its_last_error_and_no_engine(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engine.json").write_text(json.dumps({**PLAIN, "profile": ""}))
    failing = trtexec.Trtexec(program(LOG.replace("&&&& PASSED", "[x] [E] Error[2]: out of memory\n&&&& FAILED"), 0))
    (tmp_path / "model.plan").write_bytes(b"of before")
    built = failing.build(str(tmp_path), {}, seconds=2)
    assert built["refused"] == ["trtexec failed: Error[2]: out of memory"] and built["files"] == {}
    assert not (tmp_path / "model.plan").exists()


def test_what_failed_is_shown_by_its_last_lines(program, tmp_path):
    failing = program("[I] begins\n[E] Error[2]: out of memory\n&&&& FAILED TensorRT.trtexec\n", 1)
    with pytest.raises(trtexec.TrtexecError) as caught:
        trtexec.run([failing, "--onnx=m"], str(tmp_path), "build.log")
    assert str(caught.value) == (
        f"{failing} --onnx=m failed (1):\n[I] begins\n[E] Error[2]: out of memory\n&&&& FAILED TensorRT.trtexec"
    )
    assert "out of memory" in (tmp_path / "build.log").read_text()
