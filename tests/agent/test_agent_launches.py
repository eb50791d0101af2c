"""What is kept of each launch, and forgotten at the end."""

from __future__ import annotations

import os

import numpy as np
import pytest

from edgekd.agent.launches import Launches

SPEC = {"models": [{"name": "student"}], "pictures": None}


def measure_launches(number):
    """A benchmark of that many launches more in this folder."""
    launches = Launches(SPEC)
    for _ in range(number):
        for file in launches.files("student", len(launches.done)).values():
            np.save(file, np.zeros((1, 6), np.int64))
        launches.add({"student": {}}, [], 0.0, 0.0)
    return launches


@pytest.mark.parametrize("interrupted_after", [1, 2, 3])
def test_who_forgets_halfway_leaves_the_start_of_a_benchmark(tmp_path, monkeypatch, interrupted_after):
    """Not its end: launches of two benchmarks would come together."""
    monkeypatch.chdir(tmp_path)
    launches, removed, remove = measure_launches(4), [], os.remove

    def remove_some(path):
        if len(removed) == interrupted_after:
            raise KeyboardInterrupt
        removed.append(path)
        remove(path)

    monkeypatch.setattr(os, "remove", remove_some)
    with pytest.raises(KeyboardInterrupt):
        launches.forget()
    left = sorted(path.name for path in tmp_path.glob("launch_*.json"))
    assert left == [f"launch_{number}.json" for number in range(4 - interrupted_after)]
    assert len(Launches(SPEC).done) == len(left)


def test_nothing_is_left_of_a_benchmark_that_is_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measure_launches(4).forget()
    assert Launches(SPEC).done == []


@pytest.mark.parametrize("left", [0, 10])
def test_a_launch_whose_file_was_cut_short_is_measured_again(tmp_path, monkeypatch, left):
    """As a full disk or a power cut leaves it."""
    monkeypatch.chdir(tmp_path)
    measure_launches(3)
    kept = []
    for name in ("student_latency_2.npy", "launch_1.json"):
        os.truncate(name, left)
        kept.append(len(Launches(SPEC).done))
    assert kept == [2, 1]
