"""Tiny data sets in every format that edgekd reads, written anew for each test."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from formats import CLASSES, write_cifar_batch, write_folder, write_idx, write_parquet


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def write(tmp_path, rng):
    """write(name) writes 30 training and 12 test samples in that format: (options, train, test), both (images, labels).

    Samples are in the order in which the source gives them back.
    """

    def samples(n: int, channels: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.sort(np.arange(n) % 3)  # sorted, as a folder gives them back
        return rng.integers(0, 256, (n, channels, size, size), dtype=np.uint8), labels

    def written(name: str):
        path = tmp_path / name
        channels, size = {"idx": (1, 6), "cifar": (3, 32)}.get(name, (3, 6))
        train, test = samples(30, channels, size), samples(12, channels, size)
        if name == "parquet":
            write_parquet(path / "train.parquet", *train)
            write_parquet(path / "test.parquet", *test)
        elif name == "folder":
            write_folder(path / "train", *train)
            write_folder(path / "test", *test)
        elif name == "idx":
            write_idx(path, "train", *train, zipped=True)
            write_idx(path, "t10k", *test, zipped=False)
        elif name == "cifar":
            write_cifar_batch(path / "data_batch_1", train[0][:20], train[1][:20])
            write_cifar_batch(path / "data_batch_2", train[0][20:], train[1][20:])
            write_cifar_batch(path / "test_batch", *test)
            names = {b"label_names": [name.encode() for name in CLASSES]}
            (path / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
        elif name == "npz":
            path = path.with_suffix(".npz")
            arrays = dict(zip(("x_train", "y_train", "x_test", "y_test"), (*train, *test), strict=True))
            np.savez(path, **{k: v.transpose(0, 2, 3, 1) if v.ndim == 4 else v for k, v in arrays.items()})
        else:
            raise NotImplementedError(f"conftest.py has to learn to write the data set {name!r}")
        return {"path": path}, train, test

    return written


@pytest.fixture
def npz_of(tmp_path):
    """npz_of(x_train=..., ...) writes an archive: its options."""

    def written(**arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        return {"path": tmp_path / "data.npz"}

    return written
