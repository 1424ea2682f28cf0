"""Whether the header of a compressed delta makes sense: it comes from elsewhere, checksums and all.

Names in it become files, and numbers in it sizes of files, so nothing is taken on trust.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import PurePath, PureWindowsPath
from typing import Any

from guywire.core.headers import DTYPES
from guywire.methods.merging.files import Entry
from guywire.methods.merging.masks import BLOCK

__all__ = ["check_about"]

_MOST = 1 << 62


def check_about(about: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Refuse a header that says what no merge would have written.

    Args:
        about: the header.
        entries: of the file's tensors.

    Raises:
        ValueError: the first thing that is wrong.
    """
    recipe, files, metadata = (about.get(key) for key in ("recipe", "files", "metadata"))
    if not (_recipe(recipe) and _rate(about.get("rate")) and _number(about.get("seed"))):
        raise ValueError("its recipe makes no sense")
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are no table of texts")
    if not isinstance(files, dict) or not all(isinstance(rows, list) for rows in files.values()):
        raise ValueError("its list of files is none")
    names: set[str] = set()
    for file, rows in files.items():
        # A name that leads elsewhere would let a delta write any file.
        plain = PurePath(file).name == PureWindowsPath(file).name == file and file.isprintable()
        if not plain or not file.endswith(".safetensors") or file[0] == "." or len(file) > 200:
            raise ValueError(f"{file[:80]!r} is no name of a weight file")
        for row in rows:
            if not isinstance(row, dict) or not _row(row):
                name = row.get("name") if isinstance(row, dict) else row
                raise ValueError(f"what it says of {str(name)[:80]!r} makes no sense")
            if row["name"] in names:
                raise ValueError(f"it names {row['name'][:80]!r} twice")
            names.add(row["name"])
            _pieces(row, entries)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "name": lambda v: isinstance(v, str) and v == _whole(v),
    "dtype": lambda v: isinstance(v, str) and v in DTYPES,
    "shape": lambda v: isinstance(v, list) and len(v) <= 64 and all(map(_number, v)),
    "base": lambda v: v is None or isinstance(v, str),
    "pruned": lambda v: isinstance(v, bool),
    "mask": lambda v: isinstance(v, str) and v == _whole(v),
    "models": lambda v: isinstance(v, list) and len(v) < 10_000 and all(map(_number, v)),
    "common": lambda v: _number(v),
    "same": lambda v: isinstance(v, bool),
    "pieces": lambda v: isinstance(v, list) and all(map(_piece, v)),
}


def _row(row: Mapping[str, Any]) -> bool:
    return all(key in row and sound(row[key]) for key, sound in _FIELDS.items())


def _pieces(row: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    numel, entry = math.prod(row["shape"]), entries.get(row["name"])
    counts = [count for count, _ in row["pieces"]]
    held = 0 if row["same"] else sum(counts)
    if (
        len(counts) != -(-numel // BLOCK)
        or (entry is None or entry.numel != held or entry.dtype != row["dtype"])
        or (row["base"] is None and (row["pruned"] or row["same"]))
        or (row["base"] is None and any(crc is not None for _, crc in row["pieces"]))
        or row["common"] > numel
    ):
        raise ValueError(f"its pieces of {row['name'][:80]!r} do not make up the whole")


def _recipe(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("method"), str):
        return False
    q = value.get("q")
    parts = isinstance(q, dict) and isinstance(q.get("chosen"), str)
    parts = parts and all(_real(q.get(key)) for key in ("mean", "min", "max"))  # pyright: ignore[reportOptionalMemberAccess]
    return (
        _rate(value.get("rate"))
        and isinstance(value.get("base"), str)
        and ("q" not in value or parts)
    )


def _piece(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and _number(value[0])
        and value[0] <= BLOCK
        and (value[1] is None or _number(value[1]))
    )


def _number(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _real(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _rate(value: Any) -> bool:
    return _real(value) and 0.0 <= value < 1.0


def _whole(text: str) -> str:
    """The text without halves of surrogate pairs, which no file can hold."""
    return text.encode(errors="ignore").decode()
