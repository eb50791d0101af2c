"""Training batches against loops in NumPy, and their purity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd.data import Dataset, Split
from edgekd.data.batches import Batches, evaluation_batches, windows
from edgekd.errors import DataError
from edgekd.recipe import Augment

BOTH = Augment(crop=2, flip=True, seed=7)


def dataset_of(n: int = 53, shape: tuple[int, int, int] = (3, 6, 5), seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    split = Split(rng.integers(1, 256, (n, *shape), dtype=np.uint8), rng.integers(0, 4, n))
    mean, std = (tuple(rng.uniform(0.2, 0.6, shape[0])) for _ in range(2))
    return Dataset("test", split, split, split, tuple("abcd"), mean, std)


def batches_of(dataset: Dataset, *, batch_size: int = 8, augment: Augment = BOTH, seed: int = 3, **more) -> Batches:
    return Batches(
        dataset.train, dataset, batch_size=batch_size, augment=augment, seed=seed, device="cpu", **more
    )  # fmt: skip


def by_sample(batches: Batches, epoch: int) -> dict[int, np.ndarray]:
    return {int(i): x.numpy() for b in batches.epoch(epoch) for i, x in zip(b.index, b.x, strict=True)}


def order(batches: Batches, epoch: int, start: int = 0, replays: int = 1) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches.epoch(epoch, start, replays)]


def test_without_augmentation_a_batch_is_the_normalised_split():
    dataset = dataset_of()
    for batch in batches_of(dataset, augment=Augment()).epoch(0):
        index = batch.index.numpy()
        np.testing.assert_array_equal(batch.x.numpy(), dataset.normalized("train")[index])  # bit for bit
        np.testing.assert_array_equal(batch.y.numpy(), dataset.train.labels[index])
        assert (batch.index.dtype, batch.x.dtype, batch.y.dtype) == (torch.int64, torch.float32, torch.int64)


def test_every_sample_is_cropped_and_mirrored_as_in_a_loop():
    """Each augmented image is one of the loop's (2 crop + 1)^2 * 2 windows, and all of them occur."""
    dataset, crop = dataset_of(n=400), BOTH.crop
    _, height, width = dataset.train.images.shape[1:]
    padded = np.pad(dataset.train.images, ((0, 0), (0, 0), (crop, crop), (crop, crop)))
    seen = set()
    for i, x in by_sample(batches_of(dataset), 0).items():
        candidates = {}
        for top in range(2 * crop + 1):
            for left in range(2 * crop + 1):
                window = padded[i, :, top : top + height, left : left + width]
                candidates[top, left, False] = dataset.normalize(window[None])[0]
                candidates[top, left, True] = dataset.normalize(window[None, ..., ::-1])[0]
        matches = [change for change, image in candidates.items() if (image == x).all()]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 2 * (2 * crop + 1) ** 2


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 9), st.integers(2, 9)),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_windows_are_slices(shape, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    size = (int(rng.integers(1, shape[2] + 1)), int(rng.integers(1, shape[3] + 1)))
    corners = np.stack([rng.integers(0, shape[axis + 2] - size[axis] + 1, shape[0]) for axis in (0, 1)], 1)
    expected = [
        image[:, top : top + size[0], left : left + size[1]] for image, (top, left) in zip(images, corners, strict=True)
    ]
    made = windows(torch.from_numpy(images), torch.from_numpy(corners), torch.Size(size))
    np.testing.assert_array_equal(made.numpy(), np.stack(expected))


def test_flip_alone_mirrors_about_half():
    dataset = dataset_of(n=1000)
    normalized = dataset.normalized("train")
    same = [
        (x == normalized[i]).all() for i, x in by_sample(batches_of(dataset, augment=Augment(flip=True)), 0).items()
    ]
    assert 0.4 < np.mean(same) < 0.6
    for i, x in by_sample(batches_of(dataset, augment=Augment(flip=True)), 0).items():
        assert (x == normalized[i]).all() or (x == normalized[i, :, :, ::-1]).all()


def test_the_augmentation_of_a_sample_does_not_depend_on_batch_order_or_rank():
    dataset = dataset_of()
    known = by_sample(batches_of(dataset), 5)
    others = [
        batches_of(dataset, batch_size=17),
        batches_of(dataset, seed=99),
        batches_of(dataset, rank=1, world=2),
        batches_of(dataset, batch_size=500),
    ]
    for other in others:
        common = {i: x for i, x in by_sample(other, 5).items() if i in known}
        assert len(common) > 15
        assert all((x == known[i]).all() for i, x in common.items())
    in_order = torch.cat(list(batches_of(dataset).in_order(5))).numpy()
    assert len(in_order) == len(dataset.train)
    assert all((in_order[i] == x).all() for i, x in known.items())


def test_the_augmentation_depends_on_its_seed_and_the_epoch():
    dataset = dataset_of()
    one = torch.cat(list(batches_of(dataset).in_order(0)))
    assert not one.equal(torch.cat(list(batches_of(dataset).in_order(1))))
    other = Augment(crop=2, flip=True, seed=8)
    assert not one.equal(torch.cat(list(batches_of(dataset, augment=other).in_order(0))))


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    dataset = dataset_of()
    batches = batches_of(dataset)
    first = order(batches, 0)
    torch.manual_seed(1)
    list(batches.epoch(4))
    assert order(batches, 0) == first == order(batches_of(dataset, augment=Augment(seed=5)), 0)
    assert order(batches, 1) != first and order(batches_of(dataset, seed=4), 0) != first


def test_batches_leave_torch_s_own_random_state_alone():
    before = torch.get_rng_state()
    list(batches_of(dataset_of()).epoch(0))
    assert torch.get_rng_state().equal(before)


def test_an_epoch_resumes_where_it_stopped():
    batches = batches_of(dataset_of())
    whole = list(batches.epoch(2))
    rest = list(batches.epoch(2, start=4))
    assert len(rest) == len(whole) - 4
    for one, two in zip(whole[4:], rest, strict=True):
        assert one.x.equal(two.x) and one.index.equal(two.index)


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_together_see_the_batches_of_one_process(world):
    dataset = dataset_of()
    whole = order(batches_of(dataset, batch_size=4 * world), 1)
    ranks = [order(batches_of(dataset, batch_size=4, rank=rank, world=world), 1) for rank in range(world)]
    assert [[i for part in parts for i in part] for parts in zip(*ranks, strict=True)] == whole


def test_the_last_incomplete_batch_is_left_out():
    batches = batches_of(dataset_of(n=53), batch_size=8)
    assert len(batches) == len(list(batches.epoch(0))) == 6
    assert all(len(batch.y) == 8 for batch in batches.epoch(0))


def test_an_incomplete_batch_is_used_when_it_is_the_only_one():
    dataset = dataset_of(n=7)
    [batch] = batches_of(dataset, batch_size=8).epoch(0)
    assert sorted(batch.index.tolist()) == list(range(7))
    ranks = [order(batches_of(dataset, batch_size=8, rank=rank, world=2), 0) for rank in range(2)]
    assert [len(rank[0]) for rank in ranks] == [3, 3] and not set(ranks[0][0]) & set(ranks[1][0])


def test_fewer_samples_than_processes():
    with pytest.raises(DataError) as error:
        batches_of(dataset_of(n=3), world=4)
    assert str(error.value) == (
        "error: test: 3 samples cannot be shared by 4 processes\n"
        "       expected: a sample per process at least\n"
        "fix:   start fewer processes, or give more samples"
    )


def test_channels_last_has_the_same_values():
    dataset = dataset_of()
    for one, two in zip(
        batches_of(dataset).epoch(0), batches_of(dataset, channels_last=True).epoch(0), strict=True
    ):  # fmt: skip
        assert two.x.is_contiguous(memory_format=torch.channels_last) and one.x.equal(two.x)
    x = next(evaluation_batches(dataset.val, dataset, batch_size=4, device="cpu", channels_last=True))
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_evaluation_batches_are_the_whole_split_in_order():
    dataset = dataset_of()
    made = list(evaluation_batches(dataset.test, dataset, batch_size=8, device="cpu"))
    assert [len(x) for x in made] == [8] * 6 + [5]
    np.testing.assert_array_equal(torch.cat(made).numpy(), dataset.normalized("test"))


def test_batches_do_not_change_the_data_set():
    dataset = dataset_of()
    before = dataset.train.images.copy()
    list(batches_of(dataset).epoch(0))
    np.testing.assert_array_equal(dataset.train.images, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu_are_those_on_the_cpu():
    dataset = dataset_of()
    options = {"batch_size": 8, "augment": BOTH, "seed": 3}
    for one, two in zip(
        Batches(dataset.train, dataset, device="cpu", **options).epoch(1),
        Batches(dataset.train, dataset, device="cuda", **options).epoch(1),
        strict=True,
    ):
        assert two.x.is_cuda and two.y.is_cuda and two.index.is_cuda
        assert one.index.equal(two.index.cpu()) and one.y.equal(two.y.cpu())
        torch.testing.assert_close(one.x, two.x.cpu(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_replayed_batches_are_the_first_ones_of_the_epoch(world):
    dataset = dataset_of()
    for rank in range(world):
        once, thrice = (
            order(batches_of(dataset, world=world, rank=rank, batch_size=4), 1, replays=replays) for replays in (1, 3)
        )
        assert len(once) > 4 and thrice == [once[number // 3] for number in range(len(once))]
        late = order(batches_of(dataset, world=world, rank=rank, batch_size=4), 1, start=2, replays=3)
        assert late == thrice[2:]
