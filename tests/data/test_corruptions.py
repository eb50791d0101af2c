"""Every registered corruption: what it does to images, and what it leaves alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from edgekd import data, registry
from edgekd.data.corruptions import SEVERITIES, category, corrupted
from edgekd.data.corruptions.blur import convolved
from edgekd.errors import DataError, RecipeError

KINDS = registry.names("corruption")
CATEGORIES = {
    "noise": ["gaussian_noise", "shot_noise"],
    "blur": ["defocus_blur", "gaussian_blur", "motion_blur", "zoom_blur"],
    "digital": [
        "brightness_down", "brightness_up", "contrast_down", "contrast_up", "jpeg", "pixelate", "spatter",
    ],
}  # fmt: skip


def pictures(n: int, channels: int, height: int, width: int) -> np.ndarray:
    """Smooth shapes with edges, as pictures have them."""
    y, x = np.indices((height, width))
    made = [
        127 + 60 * np.sin((x * (1 + i % 3) + y) * 6 / width + i) + 50 * ((x - y * (i % 2)) % 9 > 5)
        for i in range(n * channels)
    ]
    return np.clip(np.stack(made), 0, 255).astype(np.uint8).reshape(n, channels, height, width)


def test_there_are_thirteen_in_three_categories():
    assert {name: [kind for kind in KINDS if category(kind) == name] for name in CATEGORIES} == CATEGORIES
    assert len(KINDS) == 13


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 32, 24)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_more_severe_is_farther_from_the_image_and_always_the_same(kind, size):
    images = data.load("digits", {}).test.images[:100] if size == (1, 8, 8) else pictures(20, *size)
    before = images.copy()
    made = [corrupted(images, kind, severity) for severity in SEVERITIES]
    assert all(one.shape == images.shape and one.dtype == np.uint8 for one in made)
    assert np.array_equal(images, before)
    distances = [float(np.abs(one.astype(float) - images).mean()) for one in made]
    assert distances[0] > 0.2 and distances[-1] > 1.3 * distances[0]
    # On 8x8 images 0.4 and 0.3, or 0.3 and 0.25, of 8 pixels are the same whole number.
    assert all(b >= 0.97 * a for a, b in pairwise(distances)), distances
    assert np.array_equal(corrupted(images, kind, 3), made[2])
    assert np.array_equal(corrupted(images[:1], kind, 5), made[4][:1]) or category(kind) == "noise" or kind in (
        "spatter", "motion_blur",
    )  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in KINDS if category(kind) == "blur" or kind == "pixelate"])
def test_a_plain_image_stays_plain(kind):
    images = np.full((3, 3, 20, 16), 200, np.uint8)
    for severity in SEVERITIES:
        assert np.abs(corrupted(images, kind, severity).astype(int) - 200).max() <= 1


def test_noise_has_its_variance():
    images = np.full((40, 1, 32, 32), 128, np.uint8)
    normal = corrupted(images, "gaussian_noise", 1).astype(float) / 255
    assert normal.std() == pytest.approx(0.08, rel=0.05)
    photons = corrupted(images, "shot_noise", 1).astype(float) / 255
    assert photons.std() == pytest.approx((128 / 255 / 60) ** 0.5, rel=0.05)


def test_exposure_is_arithmetic():
    images = np.array([[[[50, 100], [150, 200]]]], np.uint8)
    assert corrupted(images, "brightness_up", 2).ravel().tolist() == [101, 151, 201, 251]
    assert corrupted(images, "brightness_down", 2).ravel().tolist() == [0, 49, 99, 149]
    assert corrupted(images, "contrast_down", 1).ravel().tolist() == [95, 115, 135, 155]
    assert corrupted(images, "contrast_up", 2).ravel().tolist() == [0, 75, 175, 255]


def test_pixelate_takes_means_of_squares():
    images = np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8)
    coarse = images.reshape(4, 2, 4, 2).mean((1, 3)).repeat(2, 0).repeat(2, 1)
    np.testing.assert_allclose(corrupted(images, "pixelate", 2)[0, 0], coarse, atol=0.51)


def test_convolution_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    images, kernels = rng.random((2, 3, 7, 6)), rng.random((2, 5, 5))
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    expected = np.zeros_like(images)
    for dy in range(5):
        for dx in range(5):
            part = padded[:, :, 4 - dy : 4 - dy + 7, 4 - dx : 4 - dx + 6]
            expected += kernels[:, None, dy : dy + 1, dx : dx + 1] * part
    np.testing.assert_allclose(convolved(images, kernels), expected, atol=1e-12)


def test_an_images_chunk_decides_what_it_gets():
    images = pictures(300, 1, 8, 8)
    whole = corrupted(images, "shot_noise", 2)
    assert np.array_equal(corrupted(images[:256], "shot_noise", 2), whole[:256])


def test_what_cannot_be_corrupted_is_refused():
    with pytest.raises(RecipeError, match='"jpg" is not a known corruption'):
        corrupted(np.zeros((1, 1, 4, 4), np.uint8), "jpg", 1)
    with pytest.raises(DataError) as caught:
        corrupted(np.zeros((1, 1, 4, 4, 4), np.uint8), "jpeg", 1)
    assert str(caught.value) == (
        "error: corruptions are of pictures, and these images are 1x4x4x4\n"
        "       expected: channels, height and width\n"
        "fix:   set corruptions = null"
    )
