from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

from edgekd import registry
from edgekd.backends.onnxruntime import runner
from edgekd.errors import MissingError, RecipeError, StageError


def create(**options):
    return registry.create("backend", "onnxruntime", options=options)


@pytest.mark.parametrize("graph_optimization", ["disabled", "basic", "extended", "all"])
@pytest.mark.parametrize("threads", [1, 2])
def test_logits_equal_the_numpy_formula(make_onnx, expected, tmp_path, graph_optimization, threads):
    create(graph_optimization=graph_optimization).compile(make_onnx(), tmp_path, threads=threads)
    opened = runner.load(str(tmp_path))
    x = np.random.default_rng(1).standard_normal((7, 3, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(opened.run(x), expected(x), rtol=1e-4, atol=1e-5)
    assert opened.facts["graph_optimization"] == graph_optimization
    assert opened.facts["threads"] == threads


def test_a_provider_that_is_not_here_is_missing(make_onnx, tmp_path):
    backend = create(providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    asked = (backend.require, lambda: backend.check(make_onnx()),
             lambda: backend.compile(make_onnx(), tmp_path, threads=1))  # fmt: skip
    for ask in asked:
        with pytest.raises(MissingError) as caught:
            ask()
        what, allowed, fix = str(caught.value).splitlines()
        assert what.endswith("cannot be used here: onnxruntime has no CUDAExecutionProvider on this machine")
        assert (allowed, fix) == ("       what can be used: edgekd doctor", "fix:   pip install onnxruntime-gpu")


def test_a_silent_fallback_to_the_cpu_is_an_error(make_onnx, tmp_path):
    # Listed as available in every Linux wheel, taken by the session without a word, and runs no node.
    silent = "AzureExecutionProvider"
    if silent not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {silent}")
    with pytest.raises(MissingError, match=f"would run parts of the model on the CPU, not on {silent}"):
        create(providers=[silent]).compile(make_onnx(), tmp_path, threads=1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"operator": "Rleu"}, r"tiny\.onnx is not valid ONNX: No Op registered for Rleu with domain_version of 18"),
        (
            {"operator": "Magic", "domain": "my.ops"},
            r"onnxruntime cannot load tiny\.onnx: Fatal error: my\.ops:Magic\(-1\) is not a registered function/op",
        ),
    ],
)
def test_what_it_cannot_run_is_named(make_onnx, tmp_path, change, problem):
    model = make_onnx(**change)
    (found,) = create().check(model)
    assert re.match(problem, found), found
    with pytest.raises(StageError) as caught:
        create().compile(model, tmp_path, threads=1)
    assert "export the model" in caught.value.fix


def test_a_crash_is_an_error_with_its_last_lines(make_onnx, tmp_path, monkeypatch):
    crashing = tmp_path / "runner.py"
    crashing.write_text("import os, signal\nprint('before', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    backend, model = create(), make_onnx()
    monkeypatch.setattr(backend, "runner", crashing, raising=False)
    backend.log = tmp_path / "onnxruntime.log"
    with pytest.raises(StageError) as caught:
        backend.compile(model, tmp_path, threads=1)
    assert str(caught.value).splitlines() == [
        f"error: onnxruntime, compiling {model}: it crashed (SIGSEGV)",
        "       its last lines:",
        "         before",
        f"       all of them: {backend.log}",
        "fix:   export the model in another form, or use another backend",
    ]
    assert backend.check(model) == [f"onnxruntime, compiling {model}: it crashed (SIGSEGV)"]


def test_an_unknown_optimisation_level_is_refused():
    with pytest.raises(RecipeError, match="graph_optimization"):
        create(graph_optimization="most")


RUNS = "import sys; sys.path.insert(0, sys.argv[1]); import runner; runner.load(sys.argv[2])"


@pytest.mark.parametrize("code", [RUNS, "import edgekd, onnxruntime; onnxruntime.get_available_providers()"])
def test_telemetry_leaves_nothing_behind(make_onnx, tmp_path, code):
    (tmp_path / "engine").mkdir()
    create().compile(make_onnx(), tmp_path / "engine", threads=1)
    (tmp_path / "home").mkdir()
    plain = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    argv = [sys.executable, "-B", "-c", code, str(create().runner.parent), str(tmp_path / "engine")]
    subprocess.run(argv, env={**plain, "HOME": str(tmp_path / "home")}, check=True)
    assert list((tmp_path / "home").rglob("*")) == []


def test_without_onnxruntime_the_pip_line_is_given(make_onnx, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingError) as caught:
        create().compile(make_onnx(), tmp_path, threads=1)
    assert str(caught.value) == (
        'error: backend "onnxruntime" cannot be used here: onnxruntime not installed\n'
        "       what can be used: edgekd doctor\n"
        "fix:   pip install onnxruntime"
    )
