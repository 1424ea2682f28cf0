"""The header of a safetensors file: which tensor of which type and shape lies where.

A file is the length of its header (8 bytes, little-endian), the header (JSON, padded by spaces to a
multiple of 8 bytes) and the tensors, one after another without gaps.

Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["DTYPES", "LARGEST", "MOST_DIMENSIONS", "NAMES", "encode", "table_of", "wide_first"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The element types of safetensors that torch has."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Types of torch to what safetensors calls them."""

LARGEST = 100 << 20
"""Bytes of a header, at most: what the safetensors library allows, too."""

MOST_DIMENSIONS = 64
"""Of a tensor; as many as numpy has."""

Row = tuple[str, str, Sequence[int]]
"""Name, type (as safetensors spells it) and shape of a tensor."""


def wide_first(rows: Iterable[Row]) -> list[Row]:
    """Put wide elements first: every tensor then starts at a multiple of its own element's size.

    Args:
        rows: tensors.

    Returns:
        The same, those of one width in the order in which they came.

    Example:
        >>> wide_first([("a", "U8", (3,)), ("b", "F32", (2,)), ("c", "I32", ())])
        [('b', 'F32', (2,)), ('c', 'I32', ()), ('a', 'U8', (3,))]
    """
    return sorted(rows, key=lambda row: -DTYPES[row[1]].itemsize)


def table_of(rows: Iterable[Row]) -> tuple[dict[str, dict[str, Any]], int]:
    """Lay tensors one after another.

    Args:
        rows: tensors, in order.

    Returns:
        Names to entries of a header, whose ``data_offsets`` count from its end; and the bytes of all
        tensors.

    Example:
        >>> table_of([("b", "F32", (2,)), ("a", "U8", ())])[0]["a"]
        {'dtype': 'U8', 'shape': [], 'data_offsets': [8, 9]}
    """
    table: dict[str, dict[str, Any]] = {}
    at = 0
    for name, dtype, shape in rows:
        end = at + math.prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return table, at


def encode(table: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return what a file begins with: the length of its header, and the header.

    Args:
        table: of :func:`table_of`.
        metadata: texts by name.

    Returns:
        Bytes, a multiple of 8.

    Example:
        >>> begin = encode({}, {"by": "me"})
        >>> begin[8:], int.from_bytes(begin[:8], "little")
        (b'{"__metadata__":{"by":"me"}}    ', 32)
    """
    whole = {"__metadata__": metadata, **table} if metadata else table
    text = json.dumps(whole, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
