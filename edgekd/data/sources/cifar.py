"""CIFAR-10 and CIFAR-100 as their authors publish them for Python: pickles, read without running code in them."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.data.dataset import Part, RawData
from edgekd.data.files import content, existing, folder_of
from edgekd.errors import DataError, RecipeError
from edgekd.registry import register

_PIXELS = 3 * 32 * 32


@register("dataset")
class cifar:
    """CIFAR-10 or CIFAR-100, Python version: a folder with data_batch_1 ... test_batch, or with train and test.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. CIFAR-100 is read with its
    100 fine labels.
    """

    def __init__(self, *, path: Path) -> None:
        self.path = path

    def files(self) -> list[Path]:
        """The batches and the file with the class names. Raises RecipeError when they are not there."""
        train, test, meta = self._files()
        return [*train, test, meta]

    def read(self) -> RawData:
        """Read them. Raises DataError that names the file which is damaged or has code in it."""
        train, test, meta = self._files()
        names = _value(_unpickled(meta), meta, "fine_label_names", "label_names")
        return RawData(_part(train), _part([test]), class_names=tuple(_text(name) for name in names))

    def _files(self) -> tuple[list[Path], Path, Path]:
        folder = existing(self.path)
        batches = sorted(folder.glob("data_batch_*"))
        train = batches or [folder / "train"]
        test, meta = (folder / name for name in (("test_batch", "batches.meta") if batches else ("test", "meta")))
        missing = [file.name for file in (*train, test, meta) if not file.is_file()]
        if missing:
            raise RecipeError(
                f'data.path = "{self.path}": {", ".join(missing)} not found in this folder',
                allowed="expected: data_batch_1 to 5, test_batch and batches.meta, or train, test and meta",
                fix="set data.path to the unpacked cifar-10-batches-py or cifar-100-python",
            )
        return train, test, meta


def _part(files: list[Path]) -> Part:
    images, labels, places = [], [], []
    for file in files:
        batch = _unpickled(file)
        pixels = _value(batch, file, "data")
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
            raise DataError(
                f"{file}: data is {getattr(pixels, 'dtype', type(pixels).__name__)} {list(np.shape(pixels))}",
                allowed=f"expected: uint8 [N, {_PIXELS}]",
                fix="fetch the file again",
            )
        images.append(pixels)
        labels.append(np.asarray(_value(batch, file, "fine_labels", "labels")))
        places += [(file, row) for row in range(len(pixels))]
    return Part(
        np.concatenate(images).reshape(-1, 3, 32, 32),
        np.concatenate(labels),
        folder_of(files),
        lambda i: f"{places[i][0]}: row {places[i][1]}",
    )


def _value(batch: Any, file: Path, *keys: str) -> Any:
    """The first of `keys` that the batch has; Python 2 wrote them as bytes."""
    if isinstance(batch, dict):
        for key in keys:
            for spelled in (key, key.encode()):
                if spelled in batch:
                    return batch[spelled]
    raise DataError(
        f"{file}: there is no {' or '.join(keys)} in it",
        allowed="expected: a batch of CIFAR-10 or CIFAR-100, Python version",
        fix="fetch the file again",
    )


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _unpickled(file: Path) -> Any:
    try:
        return _ArraysOnly(io.BytesIO(content(file)), encoding="bytes").load()
    except _CodeInPickleError as error:
        raise DataError(
            f"{file}: this pickle would run {error}; it was not run",
            allowed="expected: NumPy arrays, lists, dicts, numbers and text only",
            fix="do not use the file; fetch it from the data set's authors",
        ) from None
    except DataError:
        raise
    except Exception as error:  # an unpickler fed broken bytes raises nearly anything
        raise DataError(
            f"{file}: not a readable pickle: {error}",
            allowed="expected: a whole file of CIFAR-10 or CIFAR-100, Python version",
            fix="fetch the file again",
        ) from None


class _CodeInPickleError(Exception):
    pass


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes for Python 2; `codecs.encode` itself would take any codec."""
    if encoding != "latin1":
        raise _CodeInPickleError(f"codec {encoding}")
    return text.encode("latin1")


def _allowed() -> dict[tuple[str, str], Any]:
    array = np.empty(0, np.uint8)
    names: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }
    for module in ("numpy.core", "numpy._core"):  # NumPy 1, and 2
        names[f"{module}.multiarray", "_reconstruct"] = array.__reduce__()[0]
        names[f"{module}.numeric", "_frombuffer"] = array.__reduce_ex__(5)[0]
    return names


class _ArraysOnly(pickle.Unpickler):
    _names = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        """Only what makes arrays; everything else that a pickle can name is code."""
        try:
            return self._names[module, name]
        except KeyError:
            raise _CodeInPickleError(f"{module}.{name}") from None
