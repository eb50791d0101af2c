"""Calibration sets: selection, the shipped file, and what is wrong with others."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from formats import write_folder

from edgekd.data import calibration, load
from edgekd.data.loading import read
from edgekd.errors import DataError, RecipeError
from edgekd.target import shipped_folder


def test_selection_is_stratified_pure_and_disjoint_from_test():
    made = calibration.make("digits", {}, n=100, seed=4)
    assert made.selection.class_counts == {str(k): 10 for k in range(10)}
    train = read("digits", {}).train
    np.testing.assert_array_equal(made.samples.images, train.images[made.selection.sample_ids])
    test = {image.tobytes() for image in load("digits", {}).test.images}
    assert not any(image.tobytes() in test for image in made.samples.images)
    assert calibration.make("digits", {}, n=100, seed=4).selection == made.selection
    assert calibration.make("digits", {}, n=100, seed=5).selection.sample_ids != made.selection.sample_ids


def test_more_than_there_are():
    with pytest.raises(RecipeError) as error:
        calibration.make("digits", {}, n=5000, seed=0)
    assert str(error.value) == (
        "error: a calibration set of 5000 samples cannot be selected from digits\n"
        "       expected: at most 1428\n"
        "fix:   ask for 1428 samples or fewer"
    )


@pytest.mark.parametrize("file", sorted(shipped_folder("calib").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_sets_are_what_make_makes(file, tmp_path):
    shipped = calibration.load(file.stem).selection
    made = calibration.make(shipped.dataset, shipped.options, n=shipped.n, seed=shipped.seed)
    calibration.save(made, tmp_path / file.name)
    assert (tmp_path / file.name).read_text() == file.read_text()


@pytest.fixture
def saved(write, tmp_path):
    """A calibration set over a folder of images: (its file, the folder)."""
    options, *_ = write("folder")
    calibration.save(calibration.make("folder", options, n=9, seed=0), tmp_path / "mine.yaml")
    return tmp_path / "mine.yaml", options["path"]


def test_a_path_is_given_where_the_set_is_used(saved):
    file, path = saved
    assert "path" not in file.read_text()
    assert len(calibration.load(str(file), {"path": path}).samples) == 9
    with pytest.raises(RecipeError, match=r"data.path is missing"):
        calibration.load(str(file))


def test_other_images(saved):
    file, path = saved
    write_folder(path / "train", np.zeros((30, 3, 6, 6), np.uint8), np.sort(np.arange(30) % 3))
    with pytest.raises(DataError) as error:
        calibration.load(str(file), {"path": path})
    sha256 = yaml.safe_load(file.read_text())["sha256"]
    assert str(error.value) == (
        f"error: {file}: the images of folder are not those that this calibration set was made from\n"
        f"       expected: 9 images with sha256 {sha256[:12]}...\n"
        "fix:   use the same files and options, or make a new calibration set"
    )


@pytest.mark.parametrize(
    "change", [{"sample_ids": [1, 2]}, {"sample_ids": [10**6] * 9}, {"n": 8}, {"sha256": "0" * 64}], ids=str
)
def test_a_changed_selection(saved, change):
    file, path = saved
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **change}))
    with pytest.raises(DataError, match="are not those that this calibration set was made from"):
        calibration.load(str(file), {"path": path})


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: [", "is not YAML: while parsing"),
        ("\xff", "the calibration set: input should be a valid dictionary"),
        ("", "the calibration set: input should be a valid dictionary"),
        ("dataset: digits", "n: field required"),
        ("dataset: digits\nn: 1\nsample_ids: [-1]\nsha256: a\nclass_counts: {}", "sample_ids.0: input should be"),
        ("dataset: digits\nsplit: test\nn: 1\nsample_ids: [1]\nsha256: a\nclass_counts: {}", "split: input should be"),
    ],
)
def test_no_calibration_set(tmp_path, text, what):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=what) as error:
        calibration.load(str(tmp_path / "a.yaml"))
    assert "a.yaml" in error.value.what and error.value.allowed.startswith("keys: dataset, options, split, seed, n")


def test_a_set_that_does_not_exist():
    with pytest.raises(RecipeError) as error:
        calibration.load("digit")
    assert "digit.yaml cannot be read: No such file or directory" in error.value.what
    assert error.value.fix == "name a shipped calibration set (digits), or a .yaml file"
