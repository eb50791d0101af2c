"""The modes: what they make of latencies, and what the real agent does under them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from bench_parts import CORRECT, LAUNCHES, QUERIES, ROUNDS, measured, table, tables

from edgekd import registry, stats
from edgekd.bench.latencies import DURATION, SAMPLES, WAITED, computing_ns, of_batch
from edgekd.bench.modes.fps import Fps
from edgekd.bench.modes.multi_stream import MultiStream
from edgekd.bench.modes.offline import Offline
from edgekd.bench.modes.sustained import Sustained
from edgekd.bench.summary import summarize
from edgekd.errors import RecipeError, StageError

NAMES = ("student", "teacher")
ONE_BY_ONE = """
import time
class Runner:
    facts = {}
    def run(self, x):
        if len(x) > 1:
            raise ValueError("one at a time")
        until = time.perf_counter_ns() + 200_000
        while time.perf_counter_ns() < until:
            pass
        return x[:, 0, 0, :3]
def load(folder): return Runner()
"""


def late(rows, waited_ms):
    """The rows with a wait of so many ms before each query."""
    rows = rows.copy()
    rows[:, DURATION] += (1e6 * waited_ms * np.ones(len(rows))).astype(np.int64)
    rows[:, WAITED] += (1e6 * waited_ms * np.ones(len(rows))).astype(np.int64)
    return rows


@pytest.mark.parametrize("name", registry.names("mode"))
def test_every_mode_gives_a_result_that_can_be_stored(name):
    mode = registry.create("mode", name)
    assert mode.name == name
    turns = mode.turns()
    found = {
        model: np.concatenate([table(ms, samples=turn["samples"]) for turn in turns])
        for model, ms in (("student", 1.0), ("teacher", 3.0))
    }
    result = summarize(measured(turns=len(turns)), found, CORRECT, mode)
    assert (result["status"], result["reasons"]) == ("VALID", [])
    assert result["mode"]["name"] == name
    assert result["speedup"]["value"] == pytest.approx(3.0, rel=0.01)
    assert result["latency"]["student"]["samples_per_query"] == turns[0]["samples"]
    json.dumps(result, allow_nan=False)
    both = measured(turns=len(turns))
    models = {"student": both["models"]["student"]}
    alone = summarize(both | {"models": models}, {"student": found["student"]}, {"student": CORRECT["student"]}, mode)
    assert (alone["speedup"], alone["accuracy_change"], alone["speedup_by_launch"]) == (None, None, [])
    assert alone["latency"] == {"student": result["latency"]["student"]}
    assert alone["mode"]["name"] == name and "teacher" not in json.dumps(alone)


def test_a_stream_of_several_samples_counts_them_all():
    both = tables(samples=8)
    result = summarize(measured(), both, CORRECT, MultiStream(samples_per_query=8))
    latency = result["latency"]["student"]
    assert latency["p50_ms"] == pytest.approx(1.0, rel=0.01)
    assert latency["throughput_per_s"] == pytest.approx(8e9 / both["student"][:, DURATION].mean())
    assert result["mode"]["batched"] == {"student": True, "teacher": True}


def test_offline_compares_each_at_its_best_batch():
    """The student gains until batch 4 and then loses; the teacher gains nothing."""
    ms = {"student": {1: 1.0, 2: 1.2, 4: 1.6, 8: 4.0}, "teacher": {1: 3.0, 2: 6.3, 4: 13.0, 8: 27.0}}
    found = {
        model: np.concatenate([table(one, samples=batch, seed=batch) for batch, one in by_batch.items()])
        for model, by_batch in ms.items()
    }
    result = summarize(measured(turns=4), found, CORRECT, Offline(batches=[1, 2, 4, 8]))
    assert result["mode"]["best_batch"] == {"student": 4, "teacher": 1}
    assert result["speedup"]["value"] == pytest.approx((4 / 1.6) / (1 / 3.0), rel=0.01)
    assert result["speedup"]["of"] == "throughput, each at its best batch size"
    for model, by_batch in ms.items():
        for row, (batch, one) in zip(result["mode"]["sweep"][model], by_batch.items(), strict=True):
            assert row["batch"] == batch
            assert row["p50_ms"] == pytest.approx(one, rel=0.01)
            assert row["throughput_per_s"] == pytest.approx(1e3 * batch / one, rel=0.01)
            assert row["queries"] == LAUNCHES * 2 * ROUNDS * QUERIES
    assert result["latency"]["teacher"]["p50_ms"] == pytest.approx(3.0, rel=0.01)  # of the smallest batch


def test_offline_is_invalid_when_one_batch_size_is():
    found = {
        model: np.concatenate([table(1.0), table(1.5, samples=2, drift=0.1 * (model == "teacher"))]) for model in NAMES
    }
    (reason,) = summarize(measured(turns=2), found, CORRECT, Offline(batches=[1, 2]))["reasons"]
    assert reason.startswith("unstable: the teacher at batch 2's latency drifted by +")


def test_frames_that_wait_miss_their_deadline_and_are_no_slower():
    """At 100 fps a frame has 10 ms: the teacher needs 8, and half of its frames wait 4 more."""
    student, teacher = table(1.0), table(8.0)
    teacher = np.concatenate([teacher[: len(teacher) // 2], late(teacher[len(teacher) // 2 :], 4.0)])
    result = summarize(measured(), {"student": student, "teacher": teacher}, CORRECT, Fps(fps=100))
    ours, theirs = (result["mode"]["models"][name] for name in NAMES)
    assert (ours["missed"], theirs["missed"]) == (0, len(teacher) // 2)
    assert theirs["missed_share"] == 0.5
    assert theirs["ci95"] == pytest.approx(stats.wilson(len(teacher) // 2, len(teacher)))
    assert theirs["computing_p50_ms"] == pytest.approx(8.0, rel=0.01)
    assert theirs["waited_p99_ms"] == pytest.approx(4.0)
    assert theirs["busy_share"] == pytest.approx(0.8, rel=0.01)
    assert theirs["highest_fps"] == pytest.approx(1e9 / computing_ns(teacher).mean())
    assert result["latency"]["teacher"]["p99_ms"] > 11  # from arrival to answer
    assert result["speedup"]["value"] == pytest.approx(8.0, rel=0.01)  # of the computing alone
    assert result["status"] == "VALID"


def test_changed_clocks_are_no_fault_of_a_clocked_stream():
    run = measured()
    for row in run["telemetry"][10:]:
        row["clock_hz"] = [600_000_000] * 4
    assert summarize(run, tables(), CORRECT, Fps())["status"] == "VALID"


def test_a_board_that_gets_hot_is_a_finding():
    """The student begins ahead and ends behind; the board goes from 50 to 80 degrees and says that it throttles."""
    hot = measured(foreign_cpu_s=0.0)
    seconds = LAUNCHES * 2 * ROUNDS * QUERIES / 1e3  # the table's queries are 1 ms apart
    for number, row in enumerate(hot["telemetry"]):
        row |= {"time_s": seconds * number / 20, "seconds": 0.01, "temperature_c": {"cpu": 50 + 30 * number / 19}}
    hot["telemetry"][-1] |= {"throttled": 0x4, "throttle_count": 3}
    found = {"student": table(1.0, drift=2.0), "teacher": table(1.5, seed=1)}
    result = summarize(hot, found, CORRECT, Sustained())
    assert (result["status"], result["reasons"]) == ("VALID", [])
    windows = result["mode"]["windows"]
    assert len(windows) == LAUNCHES * ROUNDS // 6
    first, last = windows[0], windows[-1]
    assert (first["rank"], last["rank"]) == (["student", "teacher"], ["teacher", "student"])
    assert first["speedup"]["value"] > 1.2 > 1 > 0.6 > last["speedup"]["value"]
    assert first["speedup"]["ci95"][0] < first["speedup"]["value"] < first["speedup"]["ci95"][1]
    assert 50 <= first["temperature_c"] < 55 < 75 < last["temperature_c"] <= 80
    assert result["mode"]["slower"]["student"] == pytest.approx(2.9 / 1.1 - 1, rel=0.05)
    assert result["mode"]["throttling"] == [
        "throttled: the firmware throttled the board",
        "throttled: the processor slowed down 3 times because it was too hot",
    ]


def test_foreign_load_makes_a_long_run_invalid_too():
    assert summarize(measured(foreign_cpu_s=0.5), tables(), CORRECT, Sustained())["status"] == "INVALID"


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("single_stream", {"seconds": 0.0}, "benchmark.seconds = 0.0 is not valid\n       expected: above 0\n"),
        ("fps", {"fps": -1.0}, "benchmark.fps = -1.0 is not valid\n       expected: frames per second, above 0\n"),
        ("multi_stream", {"samples_per_query": 1}, "benchmark.samples_per_query = 1 is not valid\n       expected: 2"),
        ("offline", {"batches": [4, 2]}, "benchmark.batches = [4, 2] is not valid\n       expected: batch sizes, each"),
        ("offline", {"batches": []}, "benchmark.batches = [] is not valid\n       expected: batch sizes, each"),
    ],
)
def test_options_that_cannot_be_measured_are_refused(name, options, error):
    with pytest.raises(RecipeError) as caught:
        registry.create("mode", name, options=options)
    assert str(caught.value).startswith(f"error: {error}")


# ---------------------------------------------------------------- by the real agent


def test_batches_are_timed_by_their_size(run, tmp_path):
    result = run(mode=Offline(seconds=0.3, batches=[1, 4]))
    for name in NAMES:
        rows = np.load(tmp_path / "work" / f"{name}_latency.npy")
        assert set(rows[:, SAMPLES]) == {1, 4}
        # The null engine takes as long for a batch as for one: whoever timed single samples would see four times that.
        assert np.median(of_batch(rows, 4)[:, DURATION]) < 2 * np.median(of_batch(rows, 1)[:, DURATION])
        assert result["mode"]["best_batch"][name] == 4


def test_an_engine_for_one_sample_answers_a_stream_one_by_one(run, tmp_path):
    result = run(mode=MultiStream(seconds=0.3, samples_per_query=3), runner=ONE_BY_ONE)
    assert result["mode"]["batched"] == {"student": False, "teacher": True}
    rows = np.load(tmp_path / "work/student_latency.npy")
    assert set(rows[:, SAMPLES]) == {3}
    assert rows[:, DURATION].min() >= 3 * 200_000


def test_an_engine_for_one_sample_is_refused_offline(run):
    with pytest.raises(StageError) as caught:
        run(mode=Offline(seconds=0.1, batches=[1, 2]), runner=ONE_BY_ONE)
    assert str(caught.value) == (
        "error: benchmark.mode = offline: the student's engine takes one sample at a time\n"
        "       it is for engines that take batches\n"
        "fix:   set export.batch = dynamic, or benchmark.mode = single_stream"
    )


def test_frames_come_on_a_clock_and_queue(run, tmp_path):
    """At 100 fps: the student needs 0.2 ms of the 10, the teacher 12, so that its queue grows by 2 ms a frame."""
    result = run(mode=Fps(seconds=0.6, fps=100), teacher_ms=12.0)
    rows = {name: np.load(tmp_path / "work" / f"{name}_latency.npy") for name in NAMES}
    for table_ in rows.values():
        first = table_[(table_[:, 0] == 0) & (table_[:, 1] == 0)]
        assert (np.diff(first[:, 2]) == 10_000_000).all()  # arrivals are the clock's, not the engine's
        assert len(first) == 10
    assert (rows["teacher"][9::10, WAITED] >= 9 * 2_000_000).all()
    assert rows["student"][:, WAITED].min() < 2_000_000
    ours, theirs = (result["mode"]["models"][name] for name in NAMES)
    assert theirs["missed_share"] == 1.0 > ours["missed_share"]
    assert theirs["busy_share"] > 1.0 > ours["busy_share"]


def test_minutes_in_short(run):
    mode = run(mode=Sustained(seconds=0.5))["mode"]
    assert mode["windows"][0]["rank"] == ["student", "teacher"]
    assert mode["windows"][-1]["end_s"] > mode["windows"][0]["start_s"] >= 0
