"""The cross-check by LoadGen itself, where it is installed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from bench_engines import null_engine

from edgekd.bench import loadgen
from edgekd.errors import MissingError, StageError

SAMPLES = np.zeros((4, 1, 4, 4), np.float32)
FOUND = {"student": {"p50_ms": 0.5}, "teacher": {"p50_ms": 1.0}}


@pytest.mark.skipif(importlib.util.find_spec("mlperf_loadgen") is None, reason="mlcommons-loadgen is not installed")
def test_both_models_are_timed_in_turns(tmp_path):
    engines = {"student": null_engine(tmp_path / "a", 0.5), "teacher": null_engine(tmp_path / "b", 2.0)}
    found = loadgen.cross_check(engines, SAMPLES, seconds=0.6, found=FOUND)
    assert found["version"]
    for name, wait_ms in (("student", 0.5), ("teacher", 2.0)):
        model = found["models"][name]
        assert len(model["p50_by_turn_ms"]) == 3
        assert min(model["p50_by_turn_ms"]) >= wait_ms
        assert wait_ms <= model["p50_ms"] <= model["p90_ms"] <= model["p99_ms"]
        assert model["n"] >= 3 * 64
        assert model["agent_over_loadgen"] == pytest.approx(FOUND[name]["p50_ms"] / model["p50_ms"])


def test_an_absent_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError) as caught:
        loadgen.require()
    assert str(caught.value) == (
        "error: benchmark.loadgen needs the Python package mlcommons-loadgen, which is not installed\n"
        "       it has wheels for Linux on x86_64; everything else of edgekd bench works without it\n"
        "fix:   pip install 'edgekd[loadgen]', or leave out --loadgen"
    )


@pytest.mark.skipif(importlib.util.find_spec("mlperf_loadgen") is None, reason="mlcommons-loadgen is not installed")
def test_an_engine_that_fails_is_named_with_its_last_lines(tmp_path):
    engines = {"student": null_engine(tmp_path / "a", 0.5)}
    with pytest.raises(StageError, match=r"LoadGen with the a failed[\s\S]*the model takes float32 \[B, 1, 4, 4\]"):
        loadgen.cross_check(engines, np.zeros((4, 3, 4, 4), np.float32), seconds=0.3, found=FOUND)


def test_a_log_without_results_is_refused(tmp_path):
    (tmp_path / "log.txt").write_text('noise\n:::MLLOG {"key": "result_50.00_percentile_latency_ns", "value": 7}\n')
    with pytest.raises(StageError, match=r"LoadGen's log has no 'result_90\.00_percentile_latency_ns'"):
        loadgen._from_log(tmp_path / "log.txt")
