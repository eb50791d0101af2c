"""Every source reads back what was written, and says what is wrong with a file that cannot be read."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats import CLASSES, encoded, write_folder, write_parquet
from PIL import Image

from edgekd import data, registry
from edgekd.data.loading import read
from edgekd.errors import DataError, MissingError, RecipeError

FORMATS = [entry.name for entry in registry.entries("dataset") if "path" in entry.options]


@pytest.mark.parametrize("name", FORMATS)
def test_reads_back_what_was_written(write, name):
    options, train, test = write(name)
    parts = read(name, options)
    for split, (images, labels) in ((parts.train, train), (parts.test, test)):
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int64
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
    assert parts.class_names == (CLASSES if name in ("parquet", "folder", "cifar") else ("0", "1", "2"))
    assert parts.notes == ()


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_path_is_named(tmp_path, name):
    with pytest.raises(RecipeError) as error:
        data.fingerprint(name, {"path": tmp_path / "nowhere" / "data"})
    assert str(error.value) == (
        f'error: data.path = "{tmp_path}/nowhere/data": there is no such file or folder\n'
        f"       {tmp_path}/nowhere does not exist either\n"
        "fix:   set data.path to where the data lies"
    )


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "npz"])
def test_an_empty_folder_is_a_recipe_error(tmp_path, name):
    with pytest.raises(RecipeError, match=f'data.path = "{tmp_path}"') as error:
        data.load(name, {"path": tmp_path})
    assert error.value.allowed and error.value.fix.startswith("set data.path to ")


def test_npz_wants_a_file(tmp_path):
    with pytest.raises(RecipeError, match="this is a folder"):
        data.load("npz", {"path": tmp_path})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("left", [0.0, 0.3, 0.8])
def test_a_truncated_file_is_named(write, name, left):
    options, *_ = write(name)
    for file in registry.create("dataset", name, options=options).files()[:6]:
        whole = file.read_bytes()
        file.write_bytes(whole[: int(left * len(whole))])
        with pytest.raises(DataError, match=file.name) as error:
            read(name, options)
        assert error.value.fix
        file.write_bytes(whole)


# --- digits -------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    known = load_digits()
    raw = registry.create("dataset", "digits").read()
    np.testing.assert_array_equal(raw.train.labels, known.target)
    np.testing.assert_array_equal(raw.train.images[:, 0], np.floor(known.images * 255 / 16 + 0.5))


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError) as error:
        data.load("digits", {})
    assert str(error.value) == (
        'error: dataset "digits" is a file of the Python package scikit-learn, which is not installed\n'
        "       it is read from that package, nothing is downloaded\n"
        "fix:   pip install 'edgekd[train]'"
    )


def test_a_missing_reader_is_named(write, monkeypatch):
    options, *_ = write("parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingError, match=r"dataset \"parquet\" needs the Python package 'pyarrow'"):
        data.load("parquet", options)


def test_fingerprint_and_digits_import_no_heavy_package():
    code = (
        "import sys; from edgekd import data; data.fingerprint('digits', {}); data.load('digits', {});"
        "print([name for name in ('torch', 'sklearn', 'pyarrow', 'PIL') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- parquet ------------------------------------------------------------------------------------------------------


def test_parquet_with_jpeg(tmp_path, rng):
    smooth = np.linspace(0, 255, 256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, 0)
    images = [np.roll(smooth, shift, 2) for shift in range(8)]
    write_parquet(tmp_path / "train.parquet", images, [0, 1, 2, 0, 1, 2, 0, 1], form="JPEG")
    parts = read("parquet", {"path": tmp_path / "train.parquet"})
    both = np.concatenate([parts.train.images, parts.test.images])
    assert {image.tobytes() for image in both} == {
        np.asarray(Image.open(io.BytesIO(encoded(image, "JPEG")))).transpose(2, 0, 1).tobytes() for image in images
    }


def test_parquet_shards_in_order_with_validation(tmp_path, rng):
    images = rng.integers(0, 256, (12, 3, 4, 4), dtype=np.uint8)
    labels = np.arange(12) % 3
    for part, rows in {
        "data/train-00000-of-00002": slice(0, 3),
        "data/train-00001-of-00002": slice(3, 6),
        "data/validation-00000-of-00001": slice(6, 9),
        "data/test-00000-of-00001": slice(9, 12),
    }.items():
        write_parquet(tmp_path / f"{part}.parquet", images[rows], labels[rows])
    parts = read("parquet", {"path": tmp_path})
    np.testing.assert_array_equal(parts.train.images, images[:6])
    assert parts.val is not None
    np.testing.assert_array_equal(parts.val.images, images[6:9])
    np.testing.assert_array_equal(parts.test.images, images[9:])
    assert parts.notes == ("the source has a validation part: its 3 samples are used, data.validation is not",)


def test_parquet_in_folders_named_after_the_parts(tmp_path, rng):
    images, labels = rng.integers(0, 256, (6, 3, 4, 4), dtype=np.uint8), np.arange(6) % 3
    write_parquet(tmp_path / "train" / "0000.parquet", images[:3], labels[:3])
    write_parquet(tmp_path / "test" / "0000.parquet", images[3:], labels[3:])
    np.testing.assert_array_equal(read("parquet", {"path": tmp_path}).test.images, images[3:])


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (("img", "fine_label"), {}),
        (("photo", "labels"), {}),  # the only struct column
        (("photo", "kind"), {"image": "photo", "label": "kind"}),
    ],
)
def test_parquet_columns(tmp_path, rng, columns, options):
    images = rng.integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)
    write_parquet(tmp_path / "a.parquet", images, np.arange(6) % 3, columns=columns)
    parts = read("parquet", {"path": tmp_path / "a.parquet", **options})
    assert parts.class_names == CLASSES and len(parts.train) + len(parts.test) == 6


def test_parquet_plain_binary_and_text_labels(tmp_path, rng):
    images = rng.integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)
    table = pa.table({"image": [encoded(image) for image in images], "label": ["cat", "ant"] * 3})
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(table.slice(0, 2), tmp_path / "test.parquet")
    parts = read("parquet", {"path": tmp_path})
    assert parts.class_names == ("ant", "cat")
    assert parts.train.labels.tolist() == [1, 0] * 3


def test_parquet_unknown_column(tmp_path, rng):
    write_parquet(tmp_path / "a.parquet", rng.integers(0, 256, (3, 3, 4, 4), dtype=np.uint8), [0, 1, 2])
    with pytest.raises(RecipeError) as error:
        read("parquet", {"path": tmp_path / "a.parquet", "label": "kind"})
    assert str(error.value) == (
        f'error: {tmp_path}/a.parquet: no label column "kind"\n'
        "       it has the columns: image, label\n"
        "fix:   set data.label to one of them"
    )
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(RecipeError, match="no image column called image or img"):
        read("parquet", {"path": tmp_path / "a.parquet"})


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ({"image": [1, 2], "label": [0, 1]}, "the image column is of type int64"),
        ({"image": [b"x", None], "label": [0, 1]}, "row 1: there are no image bytes"),
        ({"image": [{"bytes": None, "path": "a.png"}], "label": [0]}, "the image column is of type struct"),
        ({"image": [b"x", b"x"], "label": [0, None]}, "row 1: the label is None"),
        ({"image": [b"x", b"x"], "label": [0.5, 1.0]}, "row 0: the label is 0.5"),
        ({"image": [b"x", b"x"], "label": [0, 1]}, "row 0: not a readable image"),
    ],
)
def test_parquet_wrong_content(tmp_path, table, what):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(table), file)
    with pytest.raises(DataError, match=f"{file}: {what}") as error:
        read("parquet", {"path": file})
    assert error.value.allowed and error.value.fix


def test_parquet_with_other_class_names_in_test(write):
    options, _, test = write("parquet")
    write_parquet(options["path"] / "test.parquet", *test, names=("bee", "ant", "cat"))
    with pytest.raises(DataError, match=r"/train\.parquet: its class names are not those of .*/test\.parquet"):
        read("parquet", options)


# --- images: sizes, channels, depth -------------------------------------------------------------------------------


def test_images_of_different_sizes(tmp_path, rng):
    for n, size in ((0, 6), (1, 6), (2, 8)):
        write_folder(tmp_path / f"{n}", rng.integers(0, 256, (3, 3, size, size), dtype=np.uint8), [0, 1, 2])
    with pytest.raises(DataError) as error:
        read("folder", {"path": tmp_path})
    assert str(error.value) == (
        f"error: {tmp_path}/2/ant/0000.png: 8x8 pixels, but {tmp_path}/0/ant/0000.png has 6x6\n"
        "       expected: images of one size (width x height)\n"
        "fix:   set data.resize = 6 to scale and crop all to a square of that side"
    )
    parts = read("folder", {"path": tmp_path, "resize": 6})
    assert parts.train.images.shape[1:] == (3, 6, 6)


def test_resize_crops_the_middle_square(tmp_path):
    image = np.zeros((1, 4, 8), np.uint8)
    image[:, :, 2:6] = 200
    write_folder(tmp_path, [image] * 6, [0, 1, 2] * 2)
    assert (read("folder", {"path": tmp_path, "resize": 4}).train.images == 200).all()


def test_resize_must_be_positive(write):
    options, *_ = write("folder")
    with pytest.raises(RecipeError, match=r"data.resize = 0"):
        read("folder", {**options, "resize": 0})


def test_grey_among_rgb(tmp_path, rng):
    grey = rng.integers(0, 256, (6, 1, 4, 4), dtype=np.uint8)
    write_folder(tmp_path / "train", [*grey[:5], grey[5].repeat(3, 0)], [0, 1, 2] * 2)
    write_folder(tmp_path / "test", grey[:3, :, ::-1], [0, 1, 2])
    parts = read("folder", {"path": tmp_path})
    assert parts.notes == ("8 grey images among 9 were made RGB",)
    assert parts.train.images.shape == (6, 3, 4, 4) and parts.test.images.shape == (3, 3, 4, 4)
    assert (parts.train.images == parts.train.images[:, :1]).all()
    assert read("folder", {"path": tmp_path, "channels": 1}).train.images.shape == (6, 1, 4, 4)


def test_alpha_is_dropped_and_photos_are_set_upright(tmp_path, rng):
    pixels = rng.integers(0, 256, (4, 6, 4), dtype=np.uint8)
    write_folder(tmp_path, [pixels[..., :3].transpose(2, 0, 1)] * 6, [0, 1, 2] * 2)
    Image.fromarray(pixels).save(tmp_path / "ant" / "0000.png")
    turned = Image.fromarray(np.rot90(pixels[..., :3]).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    turned.save(tmp_path / "bee" / "0001.png", exif=exif)
    parts = read("folder", {"path": tmp_path})
    expected = pixels[..., :3].transpose(2, 0, 1)
    assert all((image == expected).all() for image in (*parts.train.images, *parts.test.images))


def test_sixteen_bit_images(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / name / "a.png")
    with pytest.raises(DataError, match=r"ant/a.png: pixels of more than 8 bits \(mode I;16\)"):
        read("folder", {"path": tmp_path})


def test_large_images_are_decoded_in_order_by_threads(tmp_path):
    images = np.arange(60, dtype=np.uint8)[:, None, None, None].repeat(80, 2).repeat(80, 3).repeat(3, 1)
    write_parquet(tmp_path / "train.parquet", np.concatenate([images] * 10), np.arange(600) % 3)
    write_parquet(tmp_path / "test.parquet", images[:3], [0, 1, 2])
    read_back = read("parquet", {"path": tmp_path}).train.images[:, 0, 0, 0]
    np.testing.assert_array_equal(read_back, np.arange(600) % 60)


# --- folder -------------------------------------------------------------------------------------------------------


def test_folder_with_val_only(write):
    options, _, test = write("folder")
    (options["path"] / "test").rename(options["path"] / "val")
    parts = read("folder", options)
    np.testing.assert_array_equal(parts.test.images, test[0])
    assert parts.notes == ("the source has no test part: its validation part of 12 samples serves as test",)


def test_folder_of_classes_one_of_which_is_called_train(tmp_path, rng):
    for label, name in enumerate(("bus", "train")):
        (tmp_path / name).mkdir()
        for i in range(5):
            image = rng.integers(0, 256, (3, 4, 4), dtype=np.uint8)
            (tmp_path / name / f"{label}{i}.png").write_bytes(encoded(image))
    parts = read("folder", {"path": tmp_path})
    assert parts.class_names == ("bus", "train") and len(parts.train) == 8


# --- the real thing -----------------------------------------------------------------------------------------------


@pytest.mark.skipif("EDGEKD_CIFAR10" not in os.environ, reason="EDGEKD_CIFAR10 does not name a folder with CIFAR-10")
@pytest.mark.slow
def test_cifar10():
    dataset = data.load("parquet", {"path": os.environ["EDGEKD_CIFAR10"]})
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (45000, 5000, 10000)
    assert dataset.shape == data.Shape(3, 32, 32)
    assert dataset.class_names[:3] == ("airplane", "automobile", "bird")
    assert np.bincount(dataset.val.labels).tolist() == [500] * 10
    np.testing.assert_allclose(dataset.mean, (0.4914, 0.4822, 0.4465), atol=2e-3)
    np.testing.assert_allclose(dataset.std, (0.2470, 0.2435, 0.2616), atol=3e-3)
