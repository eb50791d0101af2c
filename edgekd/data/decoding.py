"""Encoded images (PNG, JPEG, ...) to uint8 arrays, by Pillow in threads."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.data.dataset import Images, Part, RawData, SplitName
from edgekd.errors import DataError, RecipeError

_CHUNK = 256  # images per task: a task per image would cost as much as decoding a small image
_SMALL = 64 * 64 * 3  # bytes of an image up to which one thread decodes faster than several


@dataclass(frozen=True)
class Encoded:
    """An image still in its file format; `where` names it in errors."""

    where: str
    data: bytes | Path


@dataclass(frozen=True, eq=False)
class EncodedPart:
    """A part before decoding. labels: integers [N]; `file` is the file or folder of the whole part."""

    images: Sequence[Encoded]
    labels: npt.NDArray[Any]
    file: Path

    def where(self, i: int) -> str:
        """The file and place of image i."""
        return self.images[i].where


def raw_from_encoded(
    parts: Mapping[SplitName, EncodedPart],
    class_names: tuple[str, ...],
    *,
    resize: int | None,
    channels: int | None,
) -> RawData:
    """Decode the parts together, so that all get the same channels.

    resize: scale the shorter side to this many pixels and cut out the middle square; None takes images as they are.
    channels: 1 makes all grey, 3 all RGB; None keeps grey when every image is grey and else makes all RGB, since grey
    turns into RGB without loss. An alpha channel is dropped. Photos that EXIF says are turned are set upright.
    Raises DataError that names the first image which is broken, of another size than the first, or not 8 bit.
    """
    if resize is not None and resize < 1:
        raise RecipeError(f"data.resize = {resize}", allowed="expected: pixels, 1 or more", fix="set data.resize = 32")
    images, notes = _decoded([image for part in parts.values() for image in part.images], resize, channels)
    made: dict[SplitName, Part] = {}
    start = 0
    for name, part in parts.items():
        stop = start + len(part.images)
        encoded = [image.data for image in part.images]
        made[name] = Part(images[start:stop], part.labels, part.file, part.where, encoded)
        start = stop
    return RawData(made["train"], made.get("test"), made.get("val"), class_names, notes)


def _decoded(encoded: Sequence[Encoded], resize: int | None, channels: int | None) -> tuple[Images, tuple[str, ...]]:
    if not encoded:
        return np.empty((0, 1, 0, 0), np.uint8), ()
    # Python's lock is free only inside the decoder: for small images threads wait for it more than they decode.
    threads = os.cpu_count() if _decoded_image(encoded[0], resize, channels).size > _SMALL else 1
    decode = partial(_decoded_chunk, resize=resize, channels=channels)
    chunks = [encoded[start : start + _CHUNK] for start in range(0, len(encoded), _CHUNK)]
    with ThreadPoolExecutor(threads) as pool:
        arrays = [array for chunk in pool.map(decode, chunks) for array in chunk]
    grey = sum(array.ndim == 2 for array in arrays)
    height, width = arrays[0].shape[:2]
    images = np.empty((len(arrays), 1 if grey == len(arrays) else 3, height, width), np.uint8)
    for i, array in enumerate(arrays):
        if array.shape[:2] != (height, width):
            raise DataError(
                f"{encoded[i].where}: {array.shape[1]}x{array.shape[0]} pixels,"
                f" but {encoded[0].where} has {width}x{height}",
                allowed="expected: images of one size (width x height)",
                fix=f"set data.resize = {min(height, width)} to scale and crop all to a square of that side",
            )
        images[i] = array if array.ndim == 2 else array.transpose(2, 0, 1)
    mixed = 0 < grey < len(arrays)
    return images, (f"{grey} grey images among {len(arrays)} were made RGB",) if mixed else ()


def _decoded_chunk(chunk: Sequence[Encoded], resize: int | None, channels: int | None) -> list[npt.NDArray[np.uint8]]:
    return [_decoded_image(encoded, resize, channels) for encoded in chunk]


def _decoded_image(encoded: Encoded, resize: int | None, channels: int | None) -> npt.NDArray[np.uint8]:
    """One image as uint8 [H, W] when grey, [H, W, 3] when RGB."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(encoded.data) if isinstance(encoded.data, bytes) else encoded.data) as opened:
            opened.load()
            image: Image.Image = ImageOps.exif_transpose(opened) if "exif" in opened.info else opened
            if image.mode[0] not in "IF":
                grey = image.mode in ("1", "L", "LA") if channels is None else channels == 1
                image = image.convert("L" if grey else "RGB")
                if resize is not None:
                    image = ImageOps.fit(image, (resize, resize), Image.Resampling.BICUBIC)
                return np.asarray(image)
    except Exception as error:  # a decoder that is fed broken bytes raises nearly anything
        raise DataError(
            f"{encoded.where}: not a readable image: {error}",
            allowed="expected: a whole PNG, JPEG or other file that Pillow reads",
            fix="replace the image, or take it out",
        ) from None
    raise DataError(
        f"{encoded.where}: pixels of more than 8 bits (mode {image.mode})",
        allowed="expected: 8 bits per channel",
        fix="convert the images to 8 bits: only you know which range matters",
    )
