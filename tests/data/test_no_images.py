"""A recipe without images: what stands in, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd import data
from edgekd.errors import RecipeError

SIZE = {"channels": 1, "height": 8, "width": 8, "classes": 10, "samples": 200}
NORMALIZE = {"mean": [0.3], "std": [0.4]}


def test_noise_stands_in_for_all_images():
    made = data.load("none", SIZE, normalize=NORMALIZE)
    assert made.stand_ins == {"train", "val", "test"}
    assert (made.shape, made.num_classes) == (data.Shape(1, 8, 8), 10)
    assert (made.mean, made.std) == ((0.3,), (0.4,))
    assert all(len(made.split(name)) > 0 for name in ("train", "val", "test"))
    assert made.notes[:2] == (
        "there are no training images: the method makes its own",
        "there are no test images: nothing is scored, and noise stands in where graphs are compared and timed",
    )
    again = data.load("none", SIZE, normalize=NORMALIZE)
    np.testing.assert_array_equal(made.train.images, again.train.images)


def test_test_images_of_another_source():
    digits = data.load("digits", {})
    made = data.load("none", {**SIZE, "test": {"digits": {}}}, normalize=NORMALIZE)
    assert made.stand_ins == {"train", "val"}
    np.testing.assert_array_equal(made.test.images, digits.test.images)
    np.testing.assert_array_equal(made.test.labels, digits.test.labels)
    assert len(data.load("none", {**SIZE, "test": {"digits": {}}}, normalize=NORMALIZE, test_limit=20).test) == 20
    assert digits.stand_ins == set()


def test_the_fingerprint_is_that_of_the_test_images():
    bare, scored = data.fingerprint("none", SIZE), data.fingerprint("none", {**SIZE, "test": {"digits": {}}})
    assert len({bare, scored, data.fingerprint("none", {**SIZE, "classes": 7})}) == 3
    assert bare == data.fingerprint("none", SIZE)


@pytest.mark.parametrize(
    ("options", "normalize", "lines"),
    [
        (SIZE, None, [
            "error: data.normalize is missing, and there is no image to measure it on",
            "       expected: the mean and std that the teacher was trained with",
            "fix:   with its numbers: --set 'data.normalize={mean: [0.5], std: [0.5]}'"]),
        ({**SIZE, "classes": 1}, NORMALIZE, [
            "error: data.classes = 1 is not valid",
            "       expected: at least 2",
            "fix:   --set data.classes=2, or what the teacher was made for"]),
        ({**SIZE, "test": {"digits": {}, "cifar": {}}}, NORMALIZE, [
            "error: data.test must name one data set, not 2",
            "       expected: {NAME: {option: value}}",
            "fix:   name one, see: edgekd list datasets"]),
        ({**SIZE, "height": 16, "test": {"digits": {}}}, NORMALIZE, [
            "error: data.test.digits has images of 1x8x8 in 10 classes",
            "       expected: 1x16x8 in 10 classes, as data says",
            "fix:   correct data.channels, data.height, data.width and data.classes, or name another test set"]),
    ],
)  # fmt: skip
def test_what_is_refused(options, normalize, lines):
    with pytest.raises(RecipeError) as caught:
        data.load("none", options, normalize=normalize)
    assert str(caught.value).splitlines() == lines


def test_a_test_source_that_does_not_exist():
    with pytest.raises(RecipeError, match="is not a known dataset"):
        data.load("none", {**SIZE, "test": {"digit": {}}}, normalize=NORMALIZE)
