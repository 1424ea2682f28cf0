"""IDX files, the format of MNIST: a reader of our own that trusts no header.

A file is two zero bytes, a code for the type of element, the number of dimensions, each dimension
as a big-endian 32-bit number, then the elements, big-endian. Memory is taken as data arrive, never
because a header asks for it.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from guywire.core.errors import DataError
from guywire.lab.streams.images import check_room
from guywire.lab.streams.tables import TEST, TRAIN, Table

__all__ = ["find_idx", "idx_table", "read_idx"]

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MOST_DIMENSIONS = 8
# Deflate packs at most 1032 bytes into one.
_DEFLATE = 1032
_PIECE = 1 << 20
_STEMS = {
    "train images": ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
    "train labels": ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
    "test images": ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
    "test labels": ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
}


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file, gzipped or not (its first bytes tell, not its name).

    Args:
        path: the file.

    Returns:
        The array, in this machine's byte order.

    Raises:
        DataError: the file is missing, truncated, too long, corrupt or of another format.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not zipped:
                return _read(file, path, most=size)
            with gzip.GzipFile(fileobj=file) as inner:
                return _read(inner, path, most=size * _DEFLATE)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read(file: BinaryIO | gzip.GzipFile, path: Path, most: int) -> np.ndarray:
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\x00\x00" or head[2] not in _TYPES:
        raise DataError(f"{path} is not an IDX file: it begins with {head.hex() or 'nothing'}")
    dtype, dimensions = np.dtype(_TYPES[head[2]]), head[3]
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise DataError(f"{path} is a damaged IDX file: it declares {dimensions} dimensions")
    sizes = file.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise DataError(f"{path} is truncated: it ends inside its header")
    shape = struct.unpack(f">{dimensions}I", sizes)
    expected = math.prod(shape) * dtype.itemsize
    if expected > most:
        raise DataError(
            f"{path} is truncated or damaged: its header declares {expected} bytes of data "
            f"({' x '.join(map(str, shape))}), and the file cannot hold more than {most}"
        )
    check_room(expected, shape[0], str(path))
    data = bytearray()
    while len(data) <= expected and (piece := file.read(min(_PIECE, expected + 1 - len(data)))):
        data += piece
    if len(data) != expected:
        kind = "truncated" if len(data) < expected else "too long"
        raise DataError(
            f"{path} is {kind}: its header declares {expected} bytes of data "
            f"({' x '.join(map(str, shape))}): fetch it again"
        )
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def find_idx(folder: Path) -> dict[str, Path]:
    """Return the IDX files in a folder by their usual names.

    Args:
        folder: where to look.

    Returns:
        Those that are there of ``train images``, ``train labels``, ``test images``, ``test labels``.
    """
    found = {}
    for role, stems in _STEMS.items():
        for name in (stem + end for stem in stems for end in ("", ".gz")):
            if (folder / name).is_file():
                found.setdefault(role, folder / name)
    return found


def idx_table(folder: Path, name: str, how: str) -> Table:
    """Read a folder with images and labels in IDX files.

    Args:
        folder: with ``train-images-idx3-ubyte`` and so on, gzipped or not; the test files may be
            missing, and are missed only when one of them is there.
        name: of the data.
        how: how to get the files, for errors.

    Returns:
        The table.

    Raises:
        DataError: a file is missing, damaged, or does not go with the others.
    """
    found = find_idx(folder)
    roles = list(_STEMS) if {"test images", "test labels"} & found.keys() else list(_STEMS)[:2]
    for role in roles:
        if role not in found:
            raise DataError(f"{folder / _STEMS[role][0]}[.gz] is missing: {how}")
    images, labels = [], []
    for part in ("train", "test")[: len(roles) // 2]:
        x, y = read_idx(found[f"{part} images"]), read_idx(found[f"{part} labels"])
        if (
            x.dtype != np.uint8
            or x.ndim not in (3, 4)
            or not x.size
            or (x.ndim == 4 and x.shape[1] not in (1, 3))
        ):
            raise DataError(
                f"{found[f'{part} images']} holds {x.dtype} of shape {x.shape}, not images "
                "(bytes, [N, H, W] or [N, C, H, W])"
            )
        if y.ndim != 1 or y.dtype.kind not in "iu" or len(y) != len(x):
            raise DataError(
                f"{found[f'{part} labels']} holds {y.dtype} of shape {y.shape}, not a label for "
                f"each of {len(x)} images"
            )
        images.append(torch.from_numpy(x if x.ndim == 4 else x[:, None]))
        labels.append(y.astype(np.int64))
    if len({tuple(x.shape[1:]) for x in images}) > 1:
        raise DataError(f"training and test images in {folder} differ in shape")
    every = torch.cat(images)
    values, codes = np.unique(np.concatenate(labels), return_inverse=True)
    part = np.repeat(np.array([TRAIN, TEST][: len(labels)], np.int8), [len(y) for y in labels])
    return Table(
        name=name,
        kind="image",
        labels=codes.astype(np.int64),
        class_names=tuple(str(v) for v in values),
        fetch=lambda rows: every[torch.from_numpy(rows)],
        part=part if len(labels) == 2 else None,
    )
