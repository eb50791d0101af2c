"""Every way of measuring, over ssh: what comes back from a board is what this machine would have written."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from test_interruptions import jobs, measure

from edgekd import registry
from edgekd.bench.end_to_end import STEPS, Pictures

OPTIONS = {
    "single_stream": {"seconds": 0.2},
    "multi_stream": {"seconds": 0.2, "samples_per_query": 3},
    "offline": {"seconds": 0.3, "batches": [1, 4]},
    "fps": {"seconds": 0.6, "fps": 100.0},
    "sustained": {"seconds": 0.4},
}
# What only this mode finds.
FINDS = {
    "single_stream": lambda mode: mode == {"name": "single_stream"},
    "multi_stream": lambda mode: mode["samples_per_query"] == 3 and mode["batched"]["student"],
    "offline": lambda mode: [row["batch"] for row in mode["sweep"]["student"]] == [1, 4],
    "fps": lambda mode: 0 <= mode["models"]["student"]["missed_share"] <= mode["models"]["teacher"]["ci95"][1],
    "sustained": lambda mode: mode["windows"][0]["rank"] == mode["windows"][-1]["rank"] == ["student", "teacher"],
}


def test_every_mode_is_here():
    assert set(OPTIONS) == set(FINDS) == set(registry.names("mode"))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_mode_over_ssh(sshd, tmp_path, name):
    """With pictures, too: what the model takes and what a product waits for are told apart."""
    file = io.BytesIO()
    np.save(file, np.zeros((1, 4, 4), np.uint8))
    pictures = Pictures([file.getvalue()] * 3, (1, 4, 4), (0.5,), (0.25,))
    mode = registry.create("mode", name, options=OPTIONS[name])
    result = measure(sshd.url(python=sys.executable), tmp_path / "host", mode=mode, pictures=pictures)
    assert result["mode"]["name"] == name and FINDS[name](result["mode"])
    for model, wait_ms in (("student", 0.2), ("teacher", 0.6)):
        steps = result["end_to_end"]["models"][model]["steps_ms"]
        assert list(steps) == list(STEPS) and steps["infer"] >= wait_ms
        assert result["latency"][model]["p50_ms"] >= wait_ms
    assert jobs(sshd) == []
