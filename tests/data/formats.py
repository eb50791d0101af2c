"""Writes small files of every format that edgekd reads."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def encoded(image: np.ndarray, form: str = "PNG") -> bytes:
    """uint8 [C, H, W] as the bytes of an image file."""
    stream = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(stream, form)
    return stream.getvalue()


def write_parquet(file: Path, images, labels, *, names=CLASSES, form="PNG", columns=("image", "label")) -> None:
    data = [{"bytes": encoded(image, form), "path": None} for image in images]
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({columns[0]: pa.array(data, struct_type), columns[1]: pa.array(list(labels))})
    if names:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"_type": "ClassLabel", "names": list(names)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def write_folder(path: Path, images, labels) -> None:
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = path / CLASSES[label] / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(image))


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(path: Path, mark: str, images, labels, *, zipped: bool) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for what, array in (("images-idx3", images[:, 0]), ("labels-idx1", labels)):
        data = idx_bytes(array)
        name = f"{mark}-{what}-ubyte" + (".gz" if zipped else "")
        (path / name).write_bytes(gzip.compress(data) if zipped else data)


def write_cifar_batch(file: Path, images, labels, *, key: bytes = b"labels") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    batch = {b"data": images.reshape(len(images), -1), key: labels.tolist()}
    file.write_bytes(pickle.dumps(batch, protocol=2))
