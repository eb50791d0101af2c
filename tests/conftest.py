"""A store in which a cheap real job has been done, and the command line."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from tiny_job import TINY, Done, make_job

from edgekd import cli, pipeline

# How long an example takes says more about the machine than about the code.
settings.register_profile("edgekd", deadline=None)
settings.load_profile("edgekd")


@pytest.fixture(scope="session")
def done(tmp_path_factory) -> Done:
    """Not to be changed: `own_done` is a copy."""
    job = make_job(tmp_path_factory.mktemp("done") / "store")
    pipeline.run(job, "bench")
    return Done(job.store.root, job.run_id)


@pytest.fixture
def own_done(done, tmp_path) -> Done:
    """A copy of `done`, for tests that change it."""
    return Done(Path(shutil.copytree(done.store, tmp_path / "store")), done.run_id)


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """An empty folder with the tiny recipe, to work in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture
def main(capsys):
    """The command line in this process: main(argument, ...) gives (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        return (ended.value.code or 0, *capsys.readouterr())

    yield run
    logging.captureWarnings(False)
    for name in ("edgekd", "py.warnings"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [], True
        log.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def one_thread():
    """Of torch's: networks are so small that a second one only waits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def python_3_8() -> Path:
    """A real Python 3.8 with numpy and ONNX Runtime: the oldest that a board may have."""
    path = Path(__file__).parents[1] / ".venv-3.8/bin/python"
    code = "import sys, numpy, onnxruntime; assert sys.version_info[:2] == (3, 8)"
    if not path.exists() or subprocess.run([path, "-c", code], capture_output=True, check=False).returncode:
        pytest.skip("no Python 3.8: tests/device/oldest_python makes it where there is one")
    return path


def _heed_ctrl_c() -> None:
    """Where tests run in the background, Ctrl-C is ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def edgekd(tmp_path):
    """The command line in a process of its own, in an empty folder: edgekd(argument, ..., env={}) gives what it did."""

    def start(*arguments: object, env: dict[str, str] | None = None, **options) -> subprocess.Popen[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path, **options}
        plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "CI", "EDGEKD_STORE")}
        argv = [sys.executable, "-m", "edgekd", *map(str, arguments)]
        environment = {**plain, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **(env or {})}
        return subprocess.Popen(argv, env=environment, preexec_fn=_heed_ctrl_c, **options)

    def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
        with start(*arguments, **options) as process:
            out, err = process.communicate(timeout=100)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    run.start = start
    return run
