"""The command line's ways of measuring."""

from __future__ import annotations

import importlib.util
import json

import pytest
from command_line import error

from edgekd.agent.clocks import wanted
from edgekd.cli import running

MEASURES = ("bench", "run")


@pytest.mark.parametrize("command", running.STAGE_COMMANDS)
def test_only_what_measures_has_its_options(main, command):
    out = main(command, "--help")[1]
    assert [option in out for option in ("--lock-clocks", "--loadgen")] == [command in MEASURES] * 2


@pytest.mark.skipif(wanted("/") != {}, reason="this machine's clocks could be locked")
def test_clocks_that_cannot_be_locked_are_told(main, tiny, own_done):
    code, _, err = main("bench", "tiny.yaml", "--store", own_done.store, "--lock-clocks")
    assert code == 4
    assert "the clocks cannot be locked: the kernel of this machine has no files for them" in err
    assert "fix:   leave out --lock-clocks, or run it as root there, on a kernel that lets clocks be set" in err


@pytest.mark.skipif(importlib.util.find_spec("mlperf_loadgen") is None, reason="mlcommons-loadgen is not installed")
def test_loadgen_and_end_to_end_stand_in_the_report(main, tiny, own_done):
    end_to_end = ("--set", "benchmark.end_to_end=true")
    code, out, _ = main("bench", "tiny.yaml", "--store", own_done.store, "--loadgen", "--json", *end_to_end)
    assert code in (0, 6)  # the machine may be busy
    found = json.loads(out)
    assert "--set benchmark.loadgen=true" in found["command"]
    for name in ("student", "teacher"):
        model = found["loadgen"]["models"][name]
        assert model["agent_p50_ms"] == found["latency"][name]["p50_ms"]
        assert model["agent_over_loadgen"] == pytest.approx(model["agent_p50_ms"] / model["p50_ms"])
    assert found["end_to_end"]["decoder"] == "none: they are stored as pixels"
    assert "Cross-check by LoadGen" in next(own_done.store.rglob(f"*{found['run_id']}*/report.html")).read_text()


@pytest.mark.skipif(importlib.util.find_spec("mlperf_loadgen") is None, reason="mlcommons-loadgen is not installed")
def test_loadgen_is_not_asked_what_it_cannot_answer(main, tiny):
    code, _, err = main("run", "tiny.yaml", "--loadgen", "--set", "benchmark.mode=fps")
    assert code == 2
    assert error(err).endswith("benchmark.loadgen cannot check benchmark.mode = fps on local:")
    assert not list(tiny.rglob("weights*"))


def test_batches_of_an_engine_for_one_are_refused_before_training(main, tiny):
    code, _, err = main("run", "tiny.yaml", "--set", "benchmark.mode=offline", "--set", "export.batch=static")
    assert code == 2
    assert error(err).endswith(
        "benchmark.mode = offline times batches, and export.batch = static makes engines for one sample"
    )
    assert not list(tiny.rglob("weights*"))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["benchmark.mode=fpss"], 'benchmark.mode = "fpss" is not a known mode'),
        (["benchmark.fps=30"], "benchmark.fps is not a known key or option of mode single_stream"),
        (["benchmark.mode=fps", "benchmark.fps=0"], "benchmark.fps = 0.0 is not valid"),
    ],
)
def test_a_mode_that_cannot_be_meant(main, tiny, options, what):
    code, _, err = main("run", "tiny.yaml", *(word for option in options for word in ("--set", option)))
    assert code == 2
    assert error(err).endswith(what)
