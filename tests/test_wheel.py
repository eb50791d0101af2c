"""The wheel, in a fresh environment, away from the checkout: what is not installed there is missing for users too."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from edgekd import catalog

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script of a wheel that was built and installed into its own environment, without any extra."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    venv.create(folder / "venv", with_pip=True)
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    done = subprocess.run([*pip, *folder.glob("*.whl")], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no packages to install from: {done.stderr.strip().splitlines()[-1]}")
    return folder / "venv/bin/edgekd"


def run(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([script, *words], cwd=script.parent, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["targets", "calib", "recipes", "methods", "networks"])
def test_installed_wheel_finds_what_the_checkout_has(installed: Path, kind: str) -> None:
    done = run(installed, "list", kind, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {kind: json.loads(json.dumps(catalog.rows(kind), default=str))}


@pytest.mark.slow
def test_without_torch_a_run_says_what_to_install(installed: Path) -> None:
    done = run(installed, "run", "digits")
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == "fix:   pip install 'edgekd[train]'"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_usage_errors_are_three_lines_in_the_wheel_too(installed: Path) -> None:
    done = run(installed, "runn")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
