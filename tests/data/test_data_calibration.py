"""Calibration sets: selection, the shipped file, and what is wrong with others."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from formats import write_folder

from edgekd.data import Dataset, Split, calibration, load
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
    what, allowed, fix = str(error.value).splitlines()
    assert what.endswith("digit.yaml does not exist")
    assert allowed == "       shipped: digits; or the path of a .yaml file"
    assert fix == "fix:   make one: edgekd calib"


# --- the images that a quantizer looks at -------------------------------------------------------------------------


def small(train, test=None, labels=None) -> Dataset:
    """A data set of uint8 images; two classes, unless `labels` say otherwise."""
    labels = np.arange(len(train)) % 2 if labels is None else labels
    test = np.full((1, *train.shape[1:]), 9, np.uint8) if test is None else test
    split, held = Split(train, labels), Split(test, np.zeros(len(test), np.int64))
    return Dataset("folder", split, held, held, ("cat", "dog"), (0.5,), (0.5,))


def noise(n, seed=0, side=4):
    return np.random.default_rng(seed).integers(0, 255, (n, 1, side, side), np.uint8)


def test_drawn_images_are_of_all_classes_and_of_train_alone():
    dataset = load("digits", {})
    found = calibration.of(dataset, None, {}, n=50, seed=0)
    assert found.about["class_counts"] == {str(k): 5 for k in range(10)} and found.about["n"] == 50
    assert found.warnings == ()
    train = {image.tobytes() for image in dataset.train.images}
    assert all(image.tobytes() in train for image in found.samples.images)
    again, other = (calibration.of(dataset, None, {}, n=50, seed=seed).about["sha256"] for seed in (0, 1))
    assert again == found.about["sha256"] != other


def test_images_that_test_has_too_are_not_drawn():
    images = noise(40)
    found = calibration.of(small(images, test=images[:10]), None, {}, n=40, seed=0)
    assert not any((image == images[:10]).all((1, 2, 3)).any() for image in found.samples.images)
    assert 20 <= found.about["n"] <= 30


def test_a_class_without_an_image_is_told():
    labels = np.array([0] * 20 + [1], np.int64)  # its only image stays in the rest
    dataset = small(noise(21), labels=labels)
    three = Dataset(**{**vars(dataset), "class_names": ("cat", "dog", "cow")})
    three.train.labels[:10] = 2
    found = calibration.of(three, None, {}, n=12, seed=0)
    assert found.warnings == ("calibrated without an image of: dog",)
    assert found.about["class_counts"]["dog"] == 0


@pytest.mark.parametrize(
    ("dataset", "what", "allowed"),
    [
        (small(noise(20), labels=np.zeros(20, np.int64)), "all images are of the class cat", "images of all 2 classes"),
        (small(np.full((20, 1, 4, 4), 7, np.uint8)), "no image in it has two different pixels", "images like those"),
    ],
    ids=["one class", "constant"],
)
def test_images_that_cannot_calibrate(dataset, what, allowed):
    with pytest.raises(DataError) as error:
        calibration.of(dataset, None, {}, n=10, seed=0)
    assert error.value.what == f"calibration set train, drawn with seed 0: {what}"
    assert allowed in error.value.allowed
    assert error.value.fix == "raise quantize.calibration_images, or make another set: edgekd calib"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda d: Dataset(**{**vars(d), "name": "npz"}), "it is of folder"),
        (lambda d: Dataset(**{**vars(d), "train": Split(noise(4, side=5), np.arange(4) % 2)}), "images of 3x6x6"),
    ],
    ids=["source", "size"],
)
def test_a_set_of_other_images(saved, change, what):
    file, path = saved
    dataset = load("folder", {"path": path})
    with pytest.raises(DataError, match=what) as error:
        calibration.of(change(dataset), str(file), {"path": path}, n=1, seed=0)
    assert error.value.what.startswith(f"calibration set {file}: ") and error.value.fix.endswith("edgekd calib")


def test_a_set_with_test_images(saved):
    file, path = saved
    dataset = load("folder", {"path": path})
    made = calibration.load(str(file), {"path": path})
    leaked = Split(made.samples.images[3:4], made.samples.labels[3:4])
    with pytest.raises(DataError) as error:
        calibration.of(Dataset(**{**vars(dataset), "test": leaked}), str(file), {"path": path}, n=1, seed=0)
    sample = made.selection.sample_ids[3]
    assert str(error.value) == (
        f"error: calibration set {file}: 1 of its images are in the test split, sample {sample} first\n"
        "       what is measured on must not have been seen before\n"
        "fix:   make one from this data: edgekd calib"
    )
    assert len(calibration.of(dataset, str(file), {"path": path}, n=1, seed=0).samples) == 9
