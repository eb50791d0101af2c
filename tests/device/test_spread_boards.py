"""A spread student on its boards: each runs its part there, one of them is killed meanwhile, and the rest answers."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import onnxruntime
import private_sshd
import pytest
from tiny_job import SPREAD, make_job

from edgekd import pipeline, preflight
from edgekd.artifact import Store
from edgekd.device import ssh
from edgekd.errors import BoardFailed, RecipeError

# An interpreter whose agent is killed as soon as its first launch is over.
KILLED = """\
#!/bin/sh
(until ls launch* >&2; do sleep 0.05; done; kill -9 $$) >/dev/null 2>&1 </dev/null &
exec {python} "$@"
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    job = make_job(tmp_path_factory.mktemp("spread"), recipe=SPREAD)
    pipeline.run(job, "parts")
    return job.store


@pytest.fixture
def killed(tmp_path) -> str:
    file = tmp_path / "python"
    file.write_text(KILLED.format(python=sys.executable))
    file.chmod(0o700)
    return f"local:?python={file}"


def on_boards(store: Store, *urls: str, overrides: tuple[str, ...] = ()):
    job = make_job(store.root, *overrides, recipe=SPREAD)
    return replace(job, boards={f"board-{number}": replace(job, device=url) for number, url in enumerate(urls)})


@pytest.mark.slow
def test_the_answer_without_a_killed_board_is_the_fusion_of_the_rest(store, killed, tmp_path, monkeypatch, main):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(SPREAD)
    devices = ["--device", "local:", "--device", killed, "--device", "local:"]
    code, out, err = main("bench", "tiny.yaml", "--store", store.root, *devices, "--json")
    document = json.loads(out)
    first, lost, last = document["spread_run"]["boards"]
    assert code == 0 and "local-2 is silent: " in err
    assert lost["status"] == "SILENT" and lost["p50_ms"] is None
    assert lost["reasons"] == [f'benchmark on "{killed}": the agent was killed (signal SIGKILL)']
    for board in (first, last):
        assert board["status"] in ("VALID", "INVALID") and board["p50_ms"] > 0 and board["size_bytes"] > 0
        assert board["backend"] == "onnxruntime"

    _, artifacts = pipeline.recorded(store, document["run_id"])
    answered, here = (np.load(artifacts[name].file("test_features.npy")) for name in ("boards", "parts"))
    here[:, 1] = 0
    np.testing.assert_allclose(answered, here, rtol=1e-3, atol=1e-4)
    head = onnxruntime.InferenceSession(artifacts["parts"].file("head.onnx"), providers=["CPUExecutionProvider"])
    labels = np.load(artifacts["boards"].file("test_labels.npy"))
    scores = {}
    for silent in ((), (0,), (2,)):
        heard = here.copy()
        heard[:, list(silent)] = 0
        (logits,) = head.run(None, {"features": heard})
        scores[silent] = (logits.argmax(1) == labels).mean()
    rows = document["spread_run"]["silent"]
    assert [(row["silent"], row["tried"], row["ways"]) for row in rows] == [(1, 1, 1), (2, 2, 2)]
    assert rows[0]["score"] == pytest.approx(scores[()])
    assert (rows[1]["lowest_score"], rows[1]["highest_score"]) == pytest.approx(
        (min(scores[(0,)], scores[(2,)]), max(scores[(0,)], scores[(2,)]))
    )
    page = (store.run_folder(document["run_id"]) / "report.md").read_text()
    assert "The parts on their boards" in page and "the agent was killed (signal SIGKILL)" in page


@pytest.mark.slow
def test_parts_run_over_ssh_and_a_board_that_is_cut_off_is_silent(sshd, store, tmp_path, monkeypatch, main):
    """The first board loses its connection for a moment while files are sent, the last for good while it measures."""
    monkeypatch.setattr(ssh, "RECONNECT_S", 2.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(SPREAD)
    lost = private_sshd.Sshd(tmp_path / "lost")
    try:
        disturbed = [
            after(lambda: list((sshd.home / ".edgekd/files").glob("*")), sshd.cut),
            after(lambda: list((lost.home / ".edgekd/jobs").glob("job-*/launch_0.json")), lost.stop),
        ]
        urls = [sshd.url(python=sys.executable), "local:", lost.url(python=sys.executable)]
        devices = [word for url in urls for word in ("--device", url)]
        code, out, err = main("bench", "tiny.yaml", "--store", store.root, *devices, "--json")
        for thread in disturbed:
            thread.join()
    finally:
        lost.stop()
    assert code == 0, err
    document = json.loads(out)
    first, second, last = document["spread_run"]["boards"]
    assert [row["status"] in ("VALID", "INVALID") for row in (first, second)] == [True, True]
    assert last["status"] == "SILENT" and last["reasons"] == ['device "ssh://board": the connection was lost']
    _, artifacts = pipeline.recorded(store, document["run_id"])
    answered, here = (np.load(artifacts[name].file("test_features.npy")) for name in ("boards", "parts"))
    here[:, 2] = 0
    np.testing.assert_allclose(answered, here, rtol=1e-3, atol=1e-4)
    assert document["spread_run"]["silent"][0]["silent"] == 1
    assert not list((sshd.home / ".edgekd/jobs").glob("job-*"))


def after(condition, what):
    """Do something once a condition holds."""

    def watch():
        deadline = time.monotonic() + 100
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        what()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.slow
def test_boards_of_which_none_answers(store):
    nobody = "local:?python=/nonexistent"
    with pytest.raises(BoardFailed) as caught:
        pipeline.run(on_boards(store, nobody, nobody, nobody), "boards")
    assert str(caught.value) == (
        "error: no board answered; board-0: /nonexistent cannot be run: No such file or directory\n"
        "       3 boards are silent, and the head has nothing to fuse\n"
        f"fix:   edgekd doctor --device '{nobody}'"
    )


@pytest.mark.parametrize(
    ("urls", "overrides", "lines"),
    [
        (
            ["local:", "local:"],
            (),
            "error: student.boards = 3, and 2 devices are named\n"
            "       expected: a device for each part; local: may be given again and again\n"
            "fix:   name 3 devices, or one to measure the whole student there",
        ),
        (
            ["local:"] * 3,
            ("quantize.method=ptq",),
            "error: quantize.method = ptq is for a whole student, not for the parts of several boards\n"
            "       parts are compiled in floating point, and timed by themselves\n"
            "fix:   --set quantize.method=none",
        ),
    ],
)
def test_boards_that_do_not_fit_the_student(tmp_path, urls, overrides, lines):
    with pytest.raises(RecipeError) as caught:
        preflight.check(on_boards(Store(tmp_path), *urls, overrides=overrides), ["boards"])
    assert str(caught.value) == lines
