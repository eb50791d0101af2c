"""Sources of packed numbers: IDX, CIFAR's batches and NumPy archives."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from formats import CLASSES, idx_bytes, write_cifar_batch, write_idx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekd import data, registry
from edgekd.data.loading import read
from edgekd.errors import DataError, RecipeError

FORMATS = [entry.name for entry in registry.entries("dataset") if "path" in entry.options]


# --- idx ----------------------------------------------------------------------------------------------------------


def test_idx_of_emnist_and_torchvision(tmp_path, rng):
    images, labels = rng.integers(0, 256, (9, 1, 5, 4), dtype=np.uint8), np.arange(9) % 3
    write_idx(tmp_path, "emnist-digits-train", images, labels, zipped=False)
    write_idx(tmp_path, "emnist-digits-train", images, labels, zipped=True)  # torchvision keeps both
    write_idx(tmp_path, "emnist-digits-test", images[:3, :, ::-1], labels[:3], zipped=True)
    parts = read("idx", {"path": tmp_path})
    np.testing.assert_array_equal(parts.train.images, images)
    assert len(parts.test) == 3


def test_idx_of_two_sets_in_one_folder(tmp_path, rng):
    for mark in ("emnist-digits-train", "emnist-letters-train"):
        write_idx(tmp_path, mark, rng.integers(0, 256, (3, 1, 4, 4)), np.arange(3), zipped=False)
    with pytest.raises(RecipeError, match=r"emnist-letters-train-images-idx3-ubyte are of different data sets"):
        read("idx", {"path": tmp_path})


def test_idx_without_labels(write):
    options, *_ = write("idx")
    (options["path"] / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(RecipeError, match="t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte are not both there"):
        read("idx", options)


def test_idx_error_text(write):
    options, *_ = write("idx")
    file = options["path"] / "t10k-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError) as error:
        read("idx", options)
    assert str(error.value) == (
        f"error: {file}: 10 bytes of values, but its header says 12\n"
        "       expected: 12 bytes\n"
        "fix:   fetch the file again; it is cut short or damaged"
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 200), zipped=st.booleans())
def test_idx_cut_anywhere_is_a_data_error(tmp_path, cut, zipped):
    images = np.arange(9 * 16, dtype=np.uint8).reshape(9, 1, 4, 4)
    for old in tmp_path.iterdir():
        old.unlink()
    write_idx(tmp_path, "train", images, np.arange(9) % 3, zipped=zipped)
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[: cut % len(whole)])
        with pytest.raises(DataError, match=file.name):
            data.load("idx", {"path": tmp_path})
        file.write_bytes(whole)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
@pytest.mark.parametrize("name", FORMATS)
def test_a_changed_byte_never_ends_in_a_traceback(write, name, place, value):
    options, *_ = write(name)
    files = registry.create("dataset", name, options=options).files()
    file = files[place % len(files)]
    content = bytearray(file.read_bytes())
    content[place % len(content)] = value
    file.write_bytes(content)
    try:
        assert data.load(name, options).shape.channels in (1, 3)
    except (DataError, RecipeError) as error:
        assert error.fix


def test_a_gzip_bomb_of_zeros_is_no_idx(tmp_path):
    write_idx(tmp_path, "train", np.zeros((3, 1, 2, 2), np.uint8), np.arange(3), zipped=True)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(DataError, match="not an IDX file of unsigned bytes in 3 dimensions"):
        read("idx", {"path": tmp_path})


# --- cifar --------------------------------------------------------------------------------------------------------


class Runs:
    """A pickle that would leave a file behind when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", range(6))
def test_cifar_pickle_with_code_is_refused(write, tmp_path, protocol):
    options, *_ = write("cifar")
    file = options["path"] / "test_batch"
    file.write_bytes(pickle.dumps({b"data": Runs(tmp_path / "ran")}, protocol))
    with pytest.raises(DataError) as error:
        read("cifar", options)
    assert str(error.value) == (
        f"error: {file}: this pickle would run posix.mkdir; it was not run\n"
        "       expected: NumPy arrays, lists, dicts, numbers and text only\n"
        "fix:   do not use the file; fetch it from the data set's authors"
    )
    assert not (tmp_path / "ran").exists()


def test_cifar_pickle_with_another_codec_is_refused(write):
    options, *_ = write("cifar")
    (options["path"] / "test_batch").write_bytes(b"c_codecs\nencode\n(Vx\nVzip\ntR.")
    with pytest.raises(DataError, match="would run codec zip"):
        read("cifar", options)


def test_cifar_100(tmp_path, rng):
    images, labels = rng.integers(0, 256, (9, 3, 32, 32), dtype=np.uint8), np.arange(9) % 3
    write_cifar_batch(tmp_path / "train", images, labels, key=b"fine_labels")
    write_cifar_batch(tmp_path / "test", images[:3, :, ::-1], labels[:3], key=b"fine_labels")
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": list(CLASSES)}))
    parts = read("cifar", {"path": tmp_path})
    np.testing.assert_array_equal(parts.train.images, images)
    assert parts.class_names == CLASSES


@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar_written_by_any_python(write, protocol):
    options, _, (images, labels) = write("cifar")
    batch = {"data": images.reshape(len(images), -1), "labels": labels}
    (options["path"] / "test_batch").write_bytes(pickle.dumps(batch, protocol))
    np.testing.assert_array_equal(read("cifar", options).test.images, images)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({b"data": np.zeros((2, 5), np.uint8), b"labels": [0, 1]}, r"test_batch: data is uint8 \[2, 5\]"),
        ({b"labels": [0, 1]}, "test_batch: there is no data in it"),
        ({b"data": np.zeros((2, 3072), np.uint8)}, "test_batch: there is no fine_labels or labels in it"),
        ([1, 2], "test_batch: there is no data in it"),
    ],
)
def test_cifar_wrong_content(write, content, what):
    options, *_ = write("cifar")
    (options["path"] / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=what):
        read("cifar", options)


# --- npz ----------------------------------------------------------------------------------------------------------

GREY = np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4)
LABELS = np.arange(6) % 3


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GREY, GREY[:, None]),
        (GREY[..., None], GREY[:, None]),
        (GREY[:, None].repeat(3, 1), GREY[:, None].repeat(3, 1)),
        (GREY.astype(np.int64), GREY[:, None]),
        (GREY.astype(np.float32) / 255, GREY[:, None]),
    ],
    ids=["NHW", "NHWC", "NCHW", "int64", "float"],
)
def test_npz_layouts_and_types(npz_of, array, expected):
    parts = read("npz", npz_of(x_train=array, y_train=LABELS, x_test=array, y_test=LABELS))
    np.testing.assert_array_equal(parts.train.images, expected)


def test_npz_of_medmnist(npz_of):
    column = LABELS[:, None].astype(np.uint8)
    arrays = {f"{part}_images": GREY + i for i, part in enumerate(("train", "val", "test"))}
    parts = read("npz", npz_of(**arrays, train_labels=column, val_labels=column, test_labels=column))
    assert parts.val is not None
    assert [split.images[0, 0, 0, 0] for split in (parts.train, parts.val, parts.test)] == [0, 1, 2]
    assert parts.test.labels.tolist() == LABELS.tolist()


def test_npz_of_one_part(npz_of):
    parts = read("npz", npz_of(images=GREY, labels=LABELS))
    assert parts.notes == ("the source has no test part: 1 of its 6 samples are kept for test",)


@pytest.mark.parametrize(
    ("images", "what"),
    [
        (np.where(GREY == 20, np.nan, GREY / 255), r"data.npz: x_train\[1\] has NaN or infinite pixels, and 0 more"),
        (np.where(GREY > 79, np.inf, GREY / 255), r"data.npz: x_train\[5\] has NaN or infinite pixels, and 0 more"),
        (GREY / 100 - 0.5, r"data.npz: x_train has floats from -0.5 to 0.45"),
        (GREY.astype(np.int16) * 3, "data.npz: x_train is int16 from 0 to 285"),
        (GREY > 3, "data.npz: x_train is bool"),
        (GREY.reshape(6, 16), r"data.npz: x_train has shape \[6, 16\]"),
        (GREY.reshape(6, 2, 2, 4), r"data.npz: x_train has shape \[6, 2, 2, 4\]"),
        (GREY.astype(object), "data.npz: not a readable .npz file: Object arrays cannot be loaded"),
    ],
    ids=["nan", "inf", "floats", "int16", "bool", "flat", "4 channels", "objects"],
)
def test_npz_wrong_images(npz_of, images, what):
    with pytest.raises(DataError, match=what) as error:
        read("npz", npz_of(x_train=images, y_train=LABELS))
    assert error.value.allowed and error.value.fix


def test_npz_with_other_names(npz_of):
    with pytest.raises(DataError, match="no training images and labels in it; it has: a, b"):
        read("npz", npz_of(a=GREY, b=LABELS))


def test_idx_bytes_are_those_of_the_format():
    assert idx_bytes(np.array([[1, 2]])) == bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 2, 1, 2])
