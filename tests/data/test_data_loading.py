"""Splits, limits, checks, normalisation and fingerprints."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest
from formats import write_folder, write_parquet
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekd import data, registry
from edgekd.data.loading import carve
from edgekd.errors import DataError, RecipeError

IMAGES = np.random.default_rng(1).integers(0, 256, (60, 4, 4), dtype=np.uint8)
LABELS = np.arange(60) % 3


def identities(split: data.Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


# --- splits -------------------------------------------------------------------------------------------------------


@given(
    labels=hnp.arrays(np.int64, st.integers(1, 80), elements=st.integers(0, 4)),
    n=st.integers(0, 90),
    seed=st.integers(0, 2**63),
)
def test_carve(labels, n, seed):
    rest, carved = carve(labels, n, "validation", seed)
    assert sorted([*rest, *carved]) == list(range(len(labels)))
    assert (np.diff(rest) > 0).all() and (np.diff(carved) > 0).all()
    classes, counts = np.unique(labels, return_counts=True)
    assert len(carved) == min(n, len(labels) - len(classes))
    assert set(labels[rest]) == set(classes)
    for again, part in zip(carve(labels, n, "validation", seed), (rest, carved), strict=True):
        np.testing.assert_array_equal(again, part)
    assert set(carved) <= set(carve(labels, n + 1, "validation", seed)[1])
    for label, count in zip(classes, counts, strict=True):
        quota = len(carved) * count / len(labels)
        assert abs((labels[carved] == label).sum() - quota) <= len(classes)


def test_carve_is_stratified_exactly_when_it_can_be():
    labels = np.repeat([0, 1, 2], [100, 200, 300])
    assert np.bincount(labels[carve(labels, 60, "validation", 0)[1]]).tolist() == [10, 20, 30]


def test_carve_depends_on_purpose_and_seed():
    chosen = [tuple(carve(LABELS, 20, purpose, seed)[1]) for purpose in ("validation", "test") for seed in (0, 1)]
    assert len(set(chosen)) == 4


def test_digits_split():
    dataset = data.load("digits", {})
    sizes = [len(split) for split in (dataset.train, dataset.val, dataset.test)]
    assert sizes == [1294, 144, 359] and sum(sizes) == 1797
    assert not identities(dataset.train) & identities(dataset.test)
    for split in (dataset.train, dataset.val, dataset.test):
        share = np.bincount(split.labels) / len(split)
        np.testing.assert_allclose(share, 0.1, atol=0.01)
    assert dataset.notes == ("the source has no test part: 359 of its 1797 samples are kept for test",)
    assert dataset.shape == data.Shape(1, 8, 8) and dataset.num_classes == 10
    assert dataset.split("val") is dataset.val


def test_the_seed_moves_validation_but_never_test():
    one, two = (data.load("digits", {}, seed=seed) for seed in (0, 1))
    assert (one.test.images == two.test.images).all()
    assert identities(one.val) != identities(two.val)
    assert identities(one.train) | identities(one.val) == identities(two.train) | identities(two.val)
    again = data.load("digits", {}, seed=1)
    assert (again.val.images == two.val.images).all() and (again.train.labels == two.train.labels).all()


def test_limits_are_stratified():
    dataset = data.load("digits", {}, train_limit=100, test_limit=50, validation=0.2)
    assert [len(split) for split in (dataset.train, dataset.val, dataset.test)] == [80, 20, 50]
    assert np.bincount(np.concatenate([dataset.train.labels, dataset.val.labels])).tolist() == [10] * 10
    assert np.bincount(dataset.test.labels).tolist() == [5] * 10
    more = data.load("digits", {}, train_limit=200, test_limit=1000)
    assert len(more.test) == 359
    assert identities(dataset.test) <= identities(more.test)


def test_a_limit_below_the_number_of_classes():
    with pytest.raises(RecipeError) as error:
        data.load("digits", {}, train_limit=9)
    assert str(error.value) == (
        "error: data.train_limit = 9 is less than one sample per class\n"
        "       expected: at least 10, the number of classes\n"
        "fix:   set data.train_limit = 100"
    )


@pytest.mark.parametrize("validation", [0, 1, -0.1])
def test_a_validation_share_that_cannot_be(validation):
    with pytest.raises(RecipeError, match=f"data.validation = {validation} leaves no sample"):
        data.load("digits", {}, validation=validation)


def test_the_source_s_own_validation_part_is_used(npz_of):
    parts = {f"{part}_images": IMAGES[i::3] for i, part in enumerate(("train", "val", "test"))}
    labels = {f"{part}_labels": np.arange(20) % 3 for part in ("train", "val", "test")}
    dataset = data.load("npz", npz_of(**parts, **labels), validation=0.5)
    np.testing.assert_array_equal(dataset.val.images[:, 0], IMAGES[1::3])
    assert len(dataset.train) == 20
    assert dataset.notes == ("the source has a validation part: its 20 samples are used, data.validation is not",)


def test_too_few_samples_to_split(npz_of):
    two = {"x_train": IMAGES[:2], "y_train": [0, 1]}
    with pytest.raises(DataError, match=r"data.npz: 2 samples are too few to carve a test part out of them"):
        data.load("npz", npz_of(**two))
    with pytest.raises(DataError, match=r"data.npz: 2 training samples are too few to carve a validation split"):
        data.load("npz", npz_of(**two, x_test=IMAGES[2:4], y_test=[0, 1]))


# --- checks -------------------------------------------------------------------------------------------------------


def test_a_class_seen_only_in_test(tmp_path):
    write_folder(tmp_path / "train", IMAGES[:20, None], np.arange(20) % 2)
    write_folder(tmp_path / "test", IMAGES[20:26, None], np.arange(6) % 3)
    with pytest.raises(DataError) as error:
        data.load("folder", {"path": tmp_path})
    assert str(error.value) == (
        f'error: {tmp_path}/test/cat/0002.png: class "cat" is in the test part only\n'
        f"       expected: one of the 2 classes of {tmp_path}/train\n"
        'fix:   add training samples of class "cat", or take it out of the test part'
    )


def test_one_class(npz_of):
    options = npz_of(images=IMAGES, labels=np.zeros(60, int))
    with pytest.raises(DataError) as error:
        data.load("npz", options)
    assert str(error.value) == (
        f'error: {options["path"]}: all 60 training samples are of one class, "0"\n'
        "       expected: at least two classes\n"
        "fix:   add samples of another class"
    )


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (LABELS - 1, r"data.npz: images\[0\]: the label is -1, and 19 more like it"),
        (LABELS + 58, r"data.npz: images\[2\]: the label is 60, and 19 more like it"),
        (LABELS / 2, "data.npz: the labels are of type float64"),
        (LABELS[:-1], r"data.npz: 60 images, but labels of shape \[59\]"),
        (np.eye(3, dtype=int)[LABELS], r"data.npz: 60 images, but labels of shape \[60, 3\]"),
    ],
    ids=["negative", "too large", "float", "too few", "one-hot"],
)
def test_labels_that_are_no_class_numbers(npz_of, labels, what):
    with pytest.raises(DataError, match=what) as error:
        data.load("npz", npz_of(images=IMAGES, labels=labels))
    assert error.value.allowed and error.value.fix


def test_a_label_without_a_name(write):
    options, (images, labels), _ = write("parquet")
    write_parquet(options["path"] / "train.parquet", images, [*labels[:-1], 3])
    with pytest.raises(DataError) as error:
        data.load("parquet", options)
    assert str(error.value) == (
        f"error: {options['path']}/train.parquet: row 29: the label is 3, and 0 more like it\n"
        "       expected: 0 to 2, for the 3 class names\n"
        "fix:   correct the labels, or the class names"
    )


def test_an_empty_part(npz_of):
    with pytest.raises(DataError, match=r"data.npz: there is no image in it"):
        data.load("npz", npz_of(x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:0], y_test=LABELS[:0]))


def test_parts_of_other_sizes(npz_of):
    with pytest.raises(DataError, match=r"images of shape \[1, 3, 4\], those of .*data.npz are \[1, 4, 4\]"):
        data.load("npz", npz_of(x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:, 1:], y_test=LABELS))


def test_images_in_train_and_test_are_counted(npz_of):
    options = npz_of(x_train=IMAGES[:50], y_train=LABELS[:50], x_test=IMAGES[48:], y_test=LABELS[48:])
    assert data.load("npz", options).notes == (f"2 test images are also in train, first: {options['path']}: x_test[0]",)


def test_a_class_without_training_samples_is_noted(npz_of):
    options = npz_of(x_train=IMAGES, y_train=2 * LABELS, x_test=IMAGES + 1, y_test=2 * LABELS)
    assert data.load("npz", options).notes == ("2 of 5 classes have no training sample: 1, 3",)


def test_an_unknown_source_and_option():
    with pytest.raises(RecipeError, match='"digit" is not a known dataset') as error:
        data.load("digit", {})
    assert 'closest: "digits"' in error.value.allowed
    with pytest.raises(RecipeError, match=r"data\.path is not a known key or option of dataset digits"):
        data.load("digits", {"path": "x"})


# --- normalisation ------------------------------------------------------------------------------------------------


def test_normalisation(write):
    options, *_ = write("parquet")
    dataset = data.load("parquet", options)
    scaled = dataset.train.images.astype(np.float64) / 255
    np.testing.assert_allclose(dataset.mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, scaled.std((0, 2, 3)), rtol=1e-12)
    x = dataset.normalized("train")
    assert x.dtype == np.float32 and x.shape == dataset.train.images.shape
    np.testing.assert_allclose(x.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std((0, 2, 3)), 1, atol=1e-5)
    test = dataset.test.images / 255
    expected = (test - np.reshape(dataset.mean, (3, 1, 1))) / np.reshape(dataset.std, (3, 1, 1))
    np.testing.assert_allclose(dataset.normalized("test"), expected, atol=1e-6)


def test_given_normalisation():
    dataset = data.load("digits", {}, normalize={"mean": [0.5], "std": [0.5]})
    assert (dataset.mean, dataset.std) == ((0.5,), (0.5,))
    assert (dataset.normalized("val").min(), dataset.normalized("val").max()) == (-1, 1)


@pytest.mark.parametrize(
    "normalize",
    [{"mean": [0.5]}, {"mean": [0.5] * 3, "std": [0.5] * 3}, {"mean": [0.5], "std": [0.0]}, {"mean": [], "std": []}],
)
def test_normalisation_that_does_not_fit(normalize):
    with pytest.raises(RecipeError) as error:
        data.load("digits", {}, normalize=normalize)
    assert str(error.value) == (
        f"error: data.normalize = {normalize} does not fit images of 1 channel(s)\n"
        "       expected: mean and std, 1 number(s) each on the 0..1 scale, every std above 0\n"
        "fix:   correct it, or leave data.normalize out to have it computed"
    )


def test_constant_images(npz_of):
    options = npz_of(images=np.full((60, 4, 4), 7, np.uint8), labels=LABELS)
    with pytest.raises(DataError, match=r"data.npz: channel 0 has one value in all pixels"):
        data.load("npz", options)
    assert data.load("npz", options, normalize={"mean": [0.5], "std": [0.5]}).mean == (0.5,)


# --- fingerprints -------------------------------------------------------------------------------------------------

FORMATS = [entry.name for entry in registry.entries("dataset") if "path" in entry.options]


@pytest.mark.parametrize("name", FORMATS)
def test_a_fingerprint_follows_content_and_names_but_not_the_place(write, tmp_path, name):
    options, *_ = write(name)
    first = data.fingerprint(name, options)
    assert first == data.fingerprint(name, {"path": str(options["path"])}) and len(first) == 64
    moved = tmp_path / "elsewhere" / options["path"].name
    moved.parent.mkdir()
    shutil.move(options["path"], moved)
    assert data.fingerprint(name, {"path": moved}) == first
    file = registry.create("dataset", name, options={"path": moved}).files()[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert data.fingerprint(name, {"path": moved}) != first


def test_a_fingerprint_follows_names_and_options(write):
    options, *_ = write("folder")
    first = data.fingerprint("folder", options)
    assert data.fingerprint("folder", {**options, "resize": 4}) != first
    path = options["path"] / "train"
    next((path / "ant").iterdir()).rename(path / "bee" / "moved.png")
    assert data.fingerprint("folder", options) != first


def test_a_fingerprint_of_a_file_that_cannot_be_read(write):
    options, *_ = write("idx")
    file = options["path"] / "t10k-labels-idx1-ubyte"
    file.unlink()
    file.symlink_to("nowhere")  # as git-annex leaves it
    with pytest.raises(DataError) as error:
        data.fingerprint("idx", options)
    assert str(error.value) == (
        f"error: {file}: cannot be read: No such file or directory\n"
        "       all files of the data are read\n"
        "fix:   check that the file is there and that you may read it"
    )
    with pytest.raises(DataError, match=f"{file}: cannot be read"):
        data.load("idx", options)


def test_a_fingerprint_is_fast(npz_of):
    options = npz_of(images=np.zeros((18_000, 1, 32, 32), np.uint8), labels=np.zeros(18_000))
    data.fingerprint("npz", options)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        data.fingerprint("npz", options)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.15  # 18 MB
