from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from bench_parts import CORRECT, LAUNCHES, QUERIES, ROUNDS, measured, table, tables

from edgekd.agent.machine import facts
from edgekd.bench.arrays import quality_from_logits, table_from_latencies, understood
from edgekd.bench.deployment import _fetch, _progress_line
from edgekd.bench.latencies import speedups
from edgekd.bench.modes.single_stream import SingleStream
from edgekd.bench.summary import summarize
from edgekd.bench.validity import invalid_because
from edgekd.device import Device
from edgekd.errors import RecipeError, StageError
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification

SINGLE = SingleStream()


# ---------------------------------------------------------------- from what was measured to the result


def test_a_quiet_run_is_valid_and_says_how_much_faster():
    result = summarize(measured(), tables(), CORRECT, SINGLE)
    assert (result["status"], result["reasons"]) == ("VALID", [])
    assert result["speedup"]["value"] == pytest.approx(3.0, rel=0.01)
    low, high = result["speedup"]["ci95"]
    assert low < 3.0 < high < 1.01 * low
    assert len(result["speedup_by_launch"]) == LAUNCHES
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    "broken", [{"models": {"student": []}}, {"telemetry": 5}, {"device": None}, {"telemetry": [{}]}]
)
def test_what_no_agent_writes_is_said(broken):
    with pytest.raises(StageError) as caught, understood("ssh://board"):
        summarize(measured() | broken, tables(), CORRECT, SINGLE)
    assert caught.value.what.startswith('what the agent on "ssh://board" wrote is not understood: ')
    assert (caught.value.allowed, caught.value.fix) == (
        "expected: its result.json, as it was written", "measure again: edgekd bench",
    )  # fmt: skip


@pytest.mark.parametrize("models", [{}, {"../student": []}, ["student"]])
def test_a_result_of_other_models_is_none(tmp_path, models):
    (tmp_path / "theirs.json").write_text(json.dumps({"models": models}))
    with Device("local:", tmp_path).job() as job, pytest.raises(StageError) as caught:
        job.put({"result.json": tmp_path / "theirs.json"})
        _fetch(job, {"student": None}, (), tmp_path)
    assert str(caught.value).splitlines() == [
        'error: benchmark on "local:": its result is not of student',
        "       each is timed, and nothing else",
        "fix:   measure again: edgekd bench",
    ]


WHOLE = measured() | {"device": facts()}


def wrong(value, *path):
    """The result of the agent with another value at one place."""
    changed = inner = json.loads(json.dumps(WHOLE))
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (wrong("hot", "telemetry", 3, "temperature_c", "cpu"), 'telemetry.3.temperature_c.cpu = "hot"'),
        (wrong([True], "telemetry", 0, "clock_hz"), "telemetry.0.clock_hz.0 = true"),
        (wrong(0, "telemetry", 0, "seconds"), "telemetry.0.seconds = 0"),
        (wrong({"VDD_IN": None}, "telemetry", 0, "power_mw"), "telemetry.0.power_mw.VDD_IN = null"),
        (wrong([], "telemetry"), "telemetry = []"),
        (wrong("1", "models", "student", 2, "import_ms"), 'models.student.2.import_ms = "1"'),
        (wrong([], "models", "student", 0, "warm_up"), "models.student.0.warm_up = []"),
        (wrong([{"rail": "VDD_IN"}], "models", "teacher", 0, "energy"), "models.teacher.0.energy.0.sensor is missing"),
        (wrong([], "device", "model"), "device.model = []"),
        (wrong(-1, "interruptions"), "interruptions = -1"),
    ],
)
def test_another_type_in_a_result_is_said(tmp_path, result, why):
    (tmp_path / "theirs.json").write_text(json.dumps(result))
    with Device("local:", tmp_path).job() as job, pytest.raises(StageError) as caught:
        job.put({"result.json": tmp_path / "theirs.json"})
        _fetch(job, {"student": None, "teacher": None}, (), tmp_path)
    assert caught.value.what == f"result.json of the agent on local:: not what the agent writes: {why}"


def test_what_the_agent_writes_is_taken_as_it_is(tmp_path):
    (tmp_path / "ours.json").write_text(json.dumps(WHOLE))
    with Device("local:", tmp_path).job() as job:
        job.put({"result.json": tmp_path / "ours.json"})
        found = _fetch(job, {"student": None, "teacher": None}, (), tmp_path)
    assert found == {name: value for name, value in WHOLE.items() if name != "version"}


def test_progress_is_told_by_the_agents_own_lines_alone():
    told = []
    on_line = _progress_line(lambda *progress: told.append(progress))
    for line in ('{"progress": 0.5, "left_s": 3, "stage": "load"}', '{"progress": 1}', '{"progress"', "a warning",
                 '{"progress": [], "left_s": 3, "stage": "load"}'):  # fmt: skip
        on_line(line)
    assert told == [(0.5, 3.0, "load")]


def test_the_latency_figures_are_those_of_the_table():
    rows = table(2.0, noise=0.3)
    latency = summarize(measured(), {"student": rows, "teacher": rows}, CORRECT, SINGLE)["latency"]["student"]
    ms = rows[:, 3] / 1e6
    assert latency["n"] == len(ms) == LAUNCHES * 2 * ROUNDS * QUERIES
    for name, q in (("p50_ms", 50), ("p90_ms", 90), ("p99_ms", 99)):
        assert latency[name] == pytest.approx(np.percentile(ms, q))
    assert latency["mean_ms"] == pytest.approx(ms.mean())
    assert latency["std_ms"] == pytest.approx(ms.std(ddof=1))
    assert latency["throughput_per_s"] == pytest.approx(1000 / ms.mean())
    assert latency["p90_ms"] < latency["p90_early_stopping_ms"] < latency["p99_ms"] < latency["p99_early_stopping_ms"]
    assert (latency["warmup_n"], latency["load_ms"], latency["peak_rss_bytes"]) == (90, 2.0, 2)


def test_the_accuracy_change_is_student_minus_teacher():
    result = summarize(measured(), tables(), CORRECT, SINGLE)
    assert result["accuracy"]["student"]["score"] == pytest.approx(0.9)
    assert result["accuracy"]["teacher"]["score"] == pytest.approx(0.95)
    assert result["accuracy_change"]["value"] == pytest.approx(-0.05)
    low, high = result["accuracy_change"]["ci95"]
    assert low < -0.05 < high < 0
    assert result["accuracy_change"]["p_value"] == pytest.approx(2 * 0.5**10)  # 10 samples, all lost


def test_what_slows_both_models_for_a_while_does_not_move_the_speedup():
    both = tables()
    for rows in both.values():
        rows[(rows[:, 1] // 2) % 3 == 0, 3] *= 2
    np.testing.assert_allclose(speedups(both["student"], both["teacher"]), 3.0, rtol=0.01)


def test_one_odd_launch_does_not_move_the_interval():
    both = tables()
    both["student"][both["student"][:, 0] == 4, 3] *= 2
    low, high = summarize(measured(), both, CORRECT, SINGLE)["speedup"]["ci95"]
    assert 2.97 < low < high < 3.03


def test_telemetry_is_series_with_units():
    telemetry = summarize(measured(foreign_cpu_s=0.5, clock_hz=[1, 3, 2, 1]), tables(), CORRECT, SINGLE)["telemetry"]
    assert telemetry["time_s"] == [0.5 * i for i in range(20)]
    assert set(telemetry["series"]) == {"cpu_c", "clock_hz", "load_average", "foreign_cpu_share", "steal_share"}
    assert telemetry["series"]["foreign_cpu_share"] == [0.25] * 20
    assert telemetry["series"]["clock_hz"] == [3] * 20


def test_sensors_that_are_absent_are_left_out():
    rows = measured(clock_hz=[], temperature_c={})
    for row in rows["telemetry"]:
        del row["foreign_cpu_s"], row["steal_s"]
    result = summarize(rows, tables(), CORRECT, SINGLE)
    assert set(result["telemetry"]["series"]) == {"load_average"}
    assert result["status"] == "VALID"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"foreign_cpu_s": 0.5}, "foreign load: other processes used 25% of the CPU, at most 10% allowed"),
        ({"steal_s": 0.1}, "foreign load: the hypervisor took away 5% of the CPU, at most 2% allowed"),
    ],
)
def test_a_busy_machine_makes_it_invalid(row, reason):
    assert invalid_because(measured(**row), tables(), SINGLE) == [reason]


def test_changed_clocks_make_it_invalid():
    throttled = measured()
    for row in throttled["telemetry"][10:]:
        row["clock_hz"] = [600_000_000] * 4
    assert invalid_because(throttled, tables(), SINGLE) == ["clocks changed: from 600 to 1500 MHz during the run"]


@pytest.mark.parametrize(("load", "counts"), [(0.9, True), (0.02, False), (None, False)])
def test_changed_clocks_of_a_gpu_that_works_make_it_invalid(load, counts):
    run = measured(gpu_load=load, gpu_clock_hz=1_020_000_000)
    for row in run["telemetry"][10:]:
        row["gpu_clock_hz"] = 306_000_000
    reasons = ["clocks changed: the GPU's from 306 to 1020 MHz during the run"]
    assert invalid_because(run, tables(), SINGLE) == reasons * counts
    assert ("gpu_load_share" in summarize(run, tables(), CORRECT, SINGLE)["telemetry"]["series"]) == (load is not None)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"throttled": 0x1}, "throttled: the supply voltage was too low: use the board's own power supply"),
        ({"throttled": 0x2}, "throttled: the firmware capped the clock"),
        ({"throttled": 0x4}, "throttled: the firmware throttled the board"),
        ({"throttled": 0x8}, "throttled: the temperature reached its soft limit: cool the board"),
    ],
)
def test_a_throttled_board_makes_it_invalid(row, reason):
    once = measured()
    once["telemetry"][7].update(row)
    assert invalid_because(once, tables(), SINGLE) == [reason]


def test_what_happened_before_the_run_does_not():
    assert invalid_because(measured(throttled=0x50000, throttle_count=7), tables(), SINGLE) == []


def test_a_processor_that_counts_its_slowdowns_makes_it_invalid():
    hot = measured()
    for row in hot["telemetry"][10:]:
        row["throttle_count"] = 12
    assert invalid_because(hot, tables(), SINGLE) == [
        "throttled: the processor slowed down 12 times because it was too hot",
    ]


def test_an_emulated_board_makes_it_invalid():
    emulated = measured()
    emulated["device"]["emulated"] = True
    assert invalid_because(emulated, tables(), SINGLE) == [
        "emulated: aarch64 is emulated there, its times are not a board's",
    ]


def test_energy_is_that_of_one_inference_by_rail():
    rows = measured(power_mw={"VDD_IN": 5000.0})
    for number, launch in enumerate(rows["models"]["student"]):
        energy = {"rail": "VDD_IN", "sensor": "ina3221", "mj": 100.0 + number, "samples": 50, "turn": 0}
        launch["energy"] = [energy]
    result = summarize(rows, tables(), CORRECT, SINGLE)
    assert result["energy"]["student"] == [
        {"rail": "VDD_IN", "sensor": "ina3221", "per_inference_mj": pytest.approx(104 / 50), "launches": LAUNCHES}
    ]
    assert result["energy"]["teacher"] == []
    assert result["telemetry"]["series"]["VDD_IN_mw"] == [5000.0] * 20


def test_an_idle_core_that_slows_down_is_no_changed_clock():
    idle = measured()
    for row in idle["telemetry"][::2]:
        row["clock_hz"] = [1_500_000_000, 600_000_000, 600_000_000, 600_000_000]
    assert invalid_because(idle, tables(), SINGLE) == []


def test_too_few_queries_make_it_invalid():
    few = {name: rows[:: len(rows) // 63][:63] for name, rows in tables().items()}
    assert invalid_because(measured(), few, SINGLE) == [
        "too short: 63 queries of the student, at least 64 are needed for p90",
        "too short: 63 queries of the teacher, at least 64 are needed for p90",
    ]


def test_drift_makes_it_invalid():
    reasons = invalid_because(measured(), {"student": table(1.0), "teacher": table(3.0, drift=0.12)}, SINGLE)
    assert len(reasons) == 1
    assert re.fullmatch(r"unstable: the teacher's latency drifted by \+[78]\.\d%, at most 5% allowed", reasons[0])


def test_unsteady_medians_make_it_invalid():
    both = tables()
    rng = np.random.default_rng(3)
    factors = rng.uniform(0.8, 1.2, (LAUNCHES, ROUNDS))
    rows = both["student"]
    rows[:, 3] = rows[:, 3] * factors[rows[:, 0], rows[:, 1] // 2]
    reasons = invalid_because(measured(), both, SINGLE)
    assert re.match(r"unstable: the student's medians vary by 1\d\.\d% over time, at most 5% allowed", reasons[0])


def test_a_warm_up_that_never_settles_makes_it_invalid():
    unsettled = measured()
    for launch in unsettled["models"]["teacher"][:5]:
        launch["warm_up"][0]["stable"] = False
    assert invalid_because(unsettled, tables(), SINGLE) == ["unstable: the teacher did not settle in 5 of 9 warm-ups"]


# ---------------------------------------------------------------- on this machine


def runner_that(run):
    return f"class Runner:\n    facts = {{}}\n    def run(self, x):\n        {run}\ndef load(folder): return Runner()\n"


def test_two_engines_are_deployed_timed_and_scored(run, tmp_path):
    shares = []
    result = run(on_progress=lambda share, left_s, stage: shares.append(share))
    assert result["speedup"]["value"] == pytest.approx(3.0, rel=0.35)  # the machine may be busy
    assert result["accuracy"]["student"]["score"] == pytest.approx(1 / 3)  # zeros name class 0
    change = {"value": 0.0, "ci95": pytest.approx([0, 0], abs=0.3), "p_value": 1.0, "test": "McNemar"}
    assert result["accuracy_change"] == change
    assert result["engines"]["teacher"]["runtime"] == "null"
    assert result["argv"][1:] == ["-m", "agent", "bench", "spec.json", "--lifeline"]
    assert result["settings"]["launches"] == 6
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    for name in ("student", "teacher"):
        assert np.load(tmp_path / "work" / result["accuracy"][name]["logits_file"]).shape == (12, 3)
        assert len(np.load(tmp_path / "work" / result["latency"][name]["samples_file"])) == result["latency"][name]["n"]
    assert list((tmp_path / "jobs/jobs").iterdir()) == []


def test_too_few_launches_are_refused(run):
    with pytest.raises(RecipeError) as caught:
        run(launches=5)
    assert str(caught.value) == (
        "error: benchmark.launches = 5 is too few for a 95 % interval\n"
        "       at least 6\n"
        "fix:   --set benchmark.launches=6"
    )


def test_an_engine_that_fails_is_named_with_its_last_lines(run):
    with pytest.raises(StageError) as caught:
        run(runner=runner_that("raise ValueError('no such kernel')"))
    lines = str(caught.value).splitlines()
    assert lines[0] == 'error: benchmark on "local:": student: ValueError: no such kernel'
    assert lines[1] == "       its last lines:"
    assert "         ValueError: no such kernel" in lines
    assert lines[-1] == "fix:   see whether the engine runs there by itself"


@pytest.mark.parametrize(
    ("logits", "error"),
    [
        (np.array([[0, 1], [0, np.nan]]), "the student's logits are not finite, first for sample 1"),
        (np.zeros((3, 2)), "the student gave logits [3, 2] for 2 samples"),
        (np.zeros(2), "the student gave logits [2] for 2 samples"),
    ],
)
def test_answers_that_cannot_be_scored_are_refused(tmp_path, logits, error):
    np.save(tmp_path / "logits.npy", logits)
    with pytest.raises(StageError, match=re.escape(error)):
        quality_from_logits(tmp_path / "logits.npy", Judge(Classification(), np.zeros(2, np.int64), (2,)), "student")


@pytest.mark.parametrize("rows", [np.ones((5, 4), np.int64), np.arange(30.0).reshape(5, 6), np.ones((5, 6), np.int64)])
def test_what_are_no_latencies_is_refused(tmp_path, rows):
    np.save(tmp_path / "latency.npy", rows)
    with pytest.raises(StageError, match=r"latency\.npy does not hold the latencies of the student"):
        table_from_latencies(tmp_path / "latency.npy", "student")


def test_what_is_no_plain_array_is_not_opened(tmp_path):
    np.save(tmp_path / "pickle.npy", np.array([print], dtype=object), allow_pickle=True)
    np.save(tmp_path / "short.npy", np.zeros((1000, 6), np.int64))
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:500])
    (tmp_path / "text.npy").write_text("hello")
    for name in ("pickle", "short", "text"):
        with pytest.raises(StageError, match=rf"{name}\.npy from the device is no array: "):
            table_from_latencies(tmp_path / f"{name}.npy", "student")


@contextmanager
def foreign_load(processes):
    """Other programs that use that many cores."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_foreign_load_is_noticed(run):
    with foreign_load(2):
        result = run(mode=SingleStream(seconds=2.0))
    assert result["status"] == "INVALID"
    assert any(reason.startswith("foreign load: other processes used") for reason in result["reasons"])


@pytest.mark.slow
def test_a_planted_slowdown_of_3_percent_is_found(run):
    low, high = run(student_ms=0.5, teacher_ms=0.515, mode=SingleStream(seconds=3.0))["speedup"]["ci95"]
    assert low > 1.0
    assert high < 1.1
