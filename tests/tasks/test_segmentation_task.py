from __future__ import annotations

import numpy as np
import pytest
import torch
from task_answers import Read

from edgekd import data
from edgekd.data.batches import Batches
from edgekd.errors import DataError
from edgekd.recipe import Augment
from edgekd.tasks.segmentation import IGNORED, Segmentation

TASK = Segmentation()


def logits_of(named: np.ndarray, k: int) -> np.ndarray:
    return np.moveaxis(np.eye(k, dtype=np.float32)[named], -1, 1)


def test_dice_and_miou_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    labels, named = (rng.integers(0, 4, (5, 6, 7)).astype(np.uint8) for _ in range(2))
    labels[0] = 0
    named[0] = 0
    labels[1, :2] = IGNORED
    quality = TASK.quality(logits_of(named, 4), labels)
    assert quality[0] == 1  # nothing there, nothing found
    for i in range(1, 5):
        inside = labels[i] != IGNORED
        dice = []
        for k in (1, 2, 3):
            a, b = (named[i] == k) & inside, labels[i] == k
            dice.append(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert quality[i] == pytest.approx(np.mean(dice))
    inside = labels != IGNORED
    overlaps = [((named == k) & (labels == k)).sum() for k in range(4)]
    unions = [(((named == k) & inside) | (labels == k)).sum() for k in range(4)]
    found = TASK.also(logits_of(named, 4), labels)["mIoU"]
    assert found == pytest.approx(np.mean(np.array(overlaps) / unions))


def test_the_loss_is_cross_entropy_and_soft_dice_of_the_pixels_that_count():
    rng = np.random.default_rng(1)
    outputs, labels = rng.normal(0, 2, (3, 3, 4, 4)).astype(np.float32), rng.integers(0, 3, (3, 4, 4))
    labels[0, 0] = IGNORED
    p = np.exp(outputs - outputs.max(1, keepdims=True)).astype(np.float64)
    p /= p.sum(1, keepdims=True)
    inside = labels != IGNORED
    entropy = -np.log(np.take_along_axis(p, np.where(inside, labels, 0)[:, None], 1)[:, 0][inside]).mean()
    dice = []
    for k in (1, 2):
        a, b = p[:, k][inside], (labels == k)[inside]
        dice.append((2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1))
    found = TASK.loss(torch.from_numpy(outputs), torch.from_numpy(labels))
    assert float(found) == pytest.approx(entropy + 1 - np.mean(dice), rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((4, 5, 6), int), "labels int64 [4, 5, 6] for images of 6x6"),
        (np.zeros((4, 6, 6)), "labels float64 [4, 6, 6] for images of 6x6"),
        (np.full((4, 6, 6), -1), "data.npz: images[0]: the label is -1, and 3 more like it"),
        (np.full((4, 6, 6), 7), "data.npz: images[0]: the label is 7, and 3 more like it"),
    ],
)
def test_maps_that_are_no_masks_are_refused(labels, message):
    with pytest.raises(DataError) as caught:
        TASK.check(Read(np.zeros((4, 1, 6, 6), np.uint8), labels), ("background", "cat"))
    assert message in str(caught.value)


def test_masks_of_one_class_and_classes_that_train_has_not_are_refused():
    images = np.zeros((4, 1, 6, 6), np.uint8)
    empty, full = Read(images, np.zeros((4, 6, 6), int)), Read(images, np.indices((4, 6, 6))[2] % 2)
    with pytest.raises(DataError, match="all pixels of the training images are of one class"):
        TASK.check_against_train("train", empty, empty, ("0", "1"))
    with pytest.raises(DataError, match=r"images\[0\]: class 2 is in the test part only"):
        TASK.check_against_train("test", Read(images, full.labels * 2), full, ("0", "1", "2"))


@pytest.mark.parametrize("source", ["digits", "digit_volumes"])
def test_masks_move_with_their_images(source):
    dataset = data.load(source, {"target": "mask"} if source == "digits" else {}, train_limit=60, test_limit=20)
    assert dataset.outputs == (11, *dataset.train.images.shape[2:])
    given = {"batch_size": 12, "seed": 0, "device": "cpu"}
    batches = Batches(dataset.train, dataset, augment=Augment(crop=2, flip=True), **given)
    still = Batches(dataset.train, dataset, augment=Augment(), **given)
    shade = torch.from_numpy(dataset.train.images)
    mean, std = dataset.mean[0], dataset.std[0]
    moved = 0
    for batch, plain in zip(batches.epoch(0), still.epoch(0), strict=True):
        assert torch.equal(plain.y, torch.from_numpy(dataset.train.labels)[plain.index])
        pixels = ((batch.x * std + mean) * 255).round()
        outside = batch.y == IGNORED
        assert (pixels[:, 0][outside] == 0).all()
        if source == "digits":
            assert torch.equal(pixels[:, 0] >= 128, (batch.y > 0) & ~outside)
        own = dataset.train.labels[batch.index.numpy()].reshape(len(batch.index), -1).max(1)
        seen = torch.where(outside, 0, batch.y).flatten(1).amax(1).numpy()
        assert ((seen == own) | (seen == 0)).all()
        moved += int((batch.y != plain.y).any())
    assert moved and shade.dtype == torch.uint8


def test_the_volumes_follow_their_rule():
    dataset = data.load("digit_volumes", {})
    images, labels = dataset.train.images[:, 0], dataset.train.labels
    assert images.shape[1:] == labels.shape[1:] == (8, 8, 8) and str(dataset.shape) == "1x8x8x8"
    thick = (labels > 0).any((2, 3)).sum(1)
    assert set(thick) <= {1, 3} and (thick == 3).mean() > 0.95
    assert images[labels > 0].mean() > 150 and abs(float(images[labels == 0].astype(float).mean())) < 40
    flat = data.load("digits", {"target": "mask"})
    assert flat.class_names == dataset.class_names


def test_an_archive_of_volumes_is_read(tmp_path):
    rng = np.random.default_rng(0)
    volumes = rng.integers(0, 256, (30, 4, 6, 5, 1), np.uint8)
    np.savez(tmp_path / "scans.npz", images=volumes, labels=(volumes[..., 0] > 128).astype(np.uint8))
    dataset = data.load("npz", {"path": tmp_path / "scans.npz"}, task="segmentation")
    assert (dataset.shape.channels, dataset.shape.depth, dataset.shape.height, dataset.shape.width) == (1, 4, 6, 5)
    assert dataset.outputs == (2, 4, 6, 5) and dataset.class_names == ("0", "1")
    x = dataset.normalized("train")
    assert x.shape[1:] == (1, 4, 6, 5) and abs(float(x.mean())) < 1e-5
