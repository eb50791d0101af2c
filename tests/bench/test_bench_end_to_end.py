"""From stored pictures to answers: by the real agent, and against what the host makes of the same files."""

from __future__ import annotations

import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from edgekd import data
from edgekd.agent import pictures as agent
from edgekd.agent.errors import AgentError
from edgekd.bench.end_to_end import STEPS, Pictures, findings
from edgekd.errors import StageError

NAMES = ("student", "teacher")


def png(height, width, seed, mode="L"):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width) + (3,) * (mode == "RGB"), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, "PNG")
    return file.getvalue()


def pixels(images):
    return data.Split(images, np.zeros(len(images), np.int64)).stored(len(images))


def test_pixels_need_no_decoder(run):
    stored = pixels(np.zeros((5, 1, 4, 4), np.uint8))
    result = run(pictures=Pictures(stored, (1, 4, 4), (0.5,), (0.25,)))
    found = result["end_to_end"]
    assert found["decoder"] == "none: they are stored as pixels"
    for name, wait_ms in (("student", 0.2), ("teacher", 0.6)):
        model = found["models"][name]
        assert list(model["steps_ms"]) == list(STEPS)
        assert model["steps_ms"]["infer"] >= wait_ms
        assert model["p50_ms"] >= wait_ms
        assert model["p50_ms"] <= model["p90_ms"] <= model["p99_ms"]
    assert 1 < found["speedup"]["value"] < result["speedup"]["value"]  # what is around the models takes the same time
    assert result["latency"]["student"]["n"] > 0


def test_encoded_pictures_are_decoded_and_resized(run):
    stored = [png(9, 12, seed) for seed in range(3)]
    found = run(pictures=Pictures(stored, (1, 4, 4), (0.5,), (0.25,)))["end_to_end"]
    assert found["decoder"].startswith("Pillow ")
    assert min(found["models"]["student"]["steps_ms"][step] for step in ("decode", "resize")) > 0


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_board_makes_of_a_file_what_the_host_does(tmp_path, mode):
    for part, count in (("train", 8), ("test", 3)):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(count):
                (tmp_path / part / label / f"{i}.png").write_bytes(png(20, 24 + i, seed=i, mode=mode))
    dataset = data.load("folder", {"path": str(tmp_path), "resize": 16})
    stored = dataset.test.stored(6)
    assert stored[0] == (tmp_path / "test/cat/0.png").read_bytes()
    assert dataset.train.encoded == ()
    shape = (dataset.shape.channels, 16, 16)
    made = on_board(tmp_path / "board", Pictures(stored, shape, dataset.mean, dataset.std))
    np.testing.assert_array_equal(np.concatenate(made), dataset.normalized("test"))


def test_pixels_become_what_the_host_makes_of_them(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5), np.uint8)
    split = data.Split(images, np.zeros(4, np.int64))
    dataset = data.Dataset("noise", split, split, split, ("a", "b"), (0.1, 0.2, 0.3), (0.3, 0.2, 0.1))
    made = on_board(tmp_path / "board", Pictures(split.stored(4), (3, 5, 5), dataset.mean, dataset.std))
    np.testing.assert_array_equal(np.concatenate(made), dataset.normalized("test"))


def on_board(folder, pictures):
    """What the agent would feed the network."""
    spec = pictures.write(folder)
    spec["files"] = [str(folder / name.removeprefix("pictures/")) for name in spec["files"]]
    there = agent.Pictures(spec)
    return [there.normalise(there.resize(there.decode(one))) for one in there.stored]


def test_a_board_without_a_decoder_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(AgentError) as caught:
        on_board(tmp_path / "board", Pictures([b"\x89PNG"], (1, 4, 4), (0.5,), (0.25,)))
    assert str(caught.value) == (
        "benchmark.end_to_end: the images are stored in an image format, and Pillow, which decodes it, is not installed"
        " here"
    )


def test_steps_are_those_of_the_table(tmp_path):
    rng = np.random.default_rng(0)
    launch, block, _ = np.indices((6, 4, 10)).reshape(3, -1)
    tables = {}
    for name, ms in (("student", 1.0), ("teacher", 4.0)):
        steps = 1e6 * np.array([0.5, 0.2, 0.1, ms, 0.01]) * rng.uniform(0.99, 1.01, (len(launch), 5))
        tables[name] = np.column_stack([launch, block, np.arange(len(launch)), steps]).astype(np.int64)
        np.save(tmp_path / f"{name}_end_to_end.npy", tables[name])
    found = findings({"models": {name: [{"decoder": "Pillow 13"}] for name in NAMES}}, tmp_path)
    assert found["speedup"]["value"] == pytest.approx(4.81 / 1.81, rel=0.01)
    assert found["speedup"]["ci95"][0] < found["speedup"]["value"] < found["speedup"]["ci95"][1]
    for name, table in tables.items():
        whole = table[:, 3:].sum(1) / 1e6
        assert found["models"][name]["p99_ms"] == pytest.approx(np.percentile(whole, 99))
        assert found["models"][name]["steps_ms"]["decode"] == pytest.approx(np.median(table[:, 3]) / 1e6)


@pytest.mark.parametrize("table", [np.ones((5, 6), np.int64), np.ones((5, 8)), -np.ones((5, 8), np.int64)])
def test_what_are_no_steps_is_refused(tmp_path, table):
    np.save(tmp_path / "student_end_to_end.npy", table)
    with pytest.raises(StageError, match=re.escape("student_end_to_end.npy does not hold the steps of the student")):
        findings({"models": {"student": [{"decoder": ""}]}}, tmp_path)
