"""Checkpoints: a tree of plain values and tensors in one file, verified when it is read.

A checkpoint is one safetensors file: any tool that reads safetensors sees its tensors under names
such as ``model/head.weight``. The header's metadata hold the tree (which dict, list, number or
tensor stands where) as JSON, and two SHA-256 checksums: of the tensors' bytes, and of everything
else in the header. Nothing is ever unpickled.

A file is written as :mod:`guywire.core.writing` writes all of them: whole, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from guywire.core import headers
from guywire.core.errors import CheckpointError
from guywire.core.writing import replacing

__all__ = ["Tree", "load", "save"]

Tree = Any
"""dict (with str or int keys), list, tuple, bool, int, float, str, ``None`` and tensors, nested."""

_FORMAT = "guywire-1"


def save(path: str | os.PathLike[str], tree: Tree) -> None:
    """Write a tree of plain values and tensors to one safetensors file, atomically.

    Tensors are written one after another, so at most one of them is copied (from a GPU, or out of
    a strided view). A tensor that stands in the tree twice is written once.

    Args:
        path: the file; its folder must exist.
        tree: dict (with str or int keys), list, tuple, bool, int, float, str, ``None``, tensor.

    Raises:
        CheckpointError: something else is in the tree, or the file cannot be written (a full disk,
            say); what was at ``path`` before is still there then.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "state.safetensors"
        >>> save(path, {"step": 3, "w": torch.ones(2), "lr": [0.1, None]})
        >>> load(path)
        {'step': 3, 'w': tensor([1., 1.]), 'lr': [0.1, None]}
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_pack(tree, "", tensors, {}), allow_nan=False, separators=(",", ":"))
    rows = [(name, headers.NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    table, _ = headers.table_of(headers.wide_first(rows))
    payload = hashlib.sha256()
    for name in table:
        payload.update(_bytes_of(tensors[name]))
    metadata = {
        "format": _FORMAT,
        "tree": structure,
        "structure_sha256": _digest_of_structure(table, structure),
        "payload_sha256": payload.hexdigest(),
    }
    header = headers.encode(table, metadata)
    if len(header) - 8 > headers.LARGEST:
        raise CheckpointError(
            f"the structure of {path} takes {len(header) >> 20} MiB, and 100 are readable: put long "
            "lists of numbers into tensors"
        )
    with replacing(path) as file:
        file.write(header)
        for name in table:
            file.write(_bytes_of(tensors[name]))


def load(path: str | os.PathLike[str]) -> Tree:
    """Read a file that :func:`save` wrote, and verify it.

    Args:
        path: the file.

    Returns:
        The tree, with tensors on the CPU. A tensor that stood in the tree twice is one object again.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or was not written by ``save``.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path} holds more than this machine's memory") from error
    except (
        KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError, RuntimeError,
    ) as error:  # fmt: skip
        raise _damaged(path, "its header makes no sense") from error


def _pack(value: Tree, where: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
    """Turn a tree into JSON in which everything that JSON lacks is a one-key object."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Tensor):
        return {"tensor": _register(value, where, tensors, seen)}
    if type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, dict):
        items = []
        for key, item in value.items():
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise CheckpointError(
                    f"a key of {where or 'the tree'} is {key!r}: a checkpoint holds dicts with "
                    "str or int keys"
                )
            items.append([key, _pack(item, f"{where}/{key}" if where else str(key), tensors, seen)])
        return {"dict": items}
    if isinstance(value, list | tuple):
        packed = [_pack(v, f"{where}/{i}", tensors, seen) for i, v in enumerate(value)]
        return packed if isinstance(value, list) else {"tuple": packed}
    raise CheckpointError(
        f"{where or 'the tree'} is a {type(value).__name__}: a checkpoint holds dict, list, tuple, "
        "bool, int, float, str, None and tensors"
    )


def _register(tensor: Tensor, where: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> str:
    if tensor.layout != torch.strided or tensor.is_meta or hasattr(tensor, "to_local"):
        remedy = ", which gw.gathered(tree) makes of it" if hasattr(tensor, "to_local") else ""
        raise CheckpointError(
            f"{where or 'the tree'} is a {type(tensor).__name__} of layout {tensor.layout} on "
            f"{tensor.device}: a checkpoint holds ordinary dense tensors{remedy}"
        )
    if tensor.dtype not in headers.NAMES:
        raise CheckpointError(
            f"{where or 'the tree'} has the type {tensor.dtype}, which safetensors lacks"
        )
    tensor = tensor.detach().resolve_conj().resolve_neg()
    key = (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
    if tensor.numel() > 0 and key in seen:
        return seen[key]
    name = base = where or "tensor"
    number = 1
    while name in tensors or name == "__metadata__":
        number += 1
        name = f"{base}~{number}"
    tensors[name] = tensor
    seen[key] = name
    return name


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Tree:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_unpack(v, tensors) for v in content)
    if kind == "dict":
        return {key: _unpack(v, tensors) for key, v in content}
    raise KeyError(kind)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _digest_of_structure(table: dict[str, Any], structure: str) -> str:
    canonical = json.dumps([_FORMAT, table, structure], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read(file: BinaryIO, path: Path) -> Tree:
    size = os.fstat(file.fileno()).st_size
    table, metadata, start = _read_header(file, path, size)
    structure = metadata["tree"]
    if metadata.get("structure_sha256") != _digest_of_structure(table, structure):
        raise _damaged(path, "the checksum of its header does not match")
    # Before anything is allocated: the table must describe exactly the bytes that are there.
    rows = sorted(table.items(), key=lambda row: row[1]["data_offsets"])
    offset = 0
    for name, row in rows:
        begin, end = row["data_offsets"]
        width = headers.DTYPES[row["dtype"]].itemsize
        if len(row["shape"]) > headers.MOST_DIMENSIONS or not all(
            type(n) is int and 0 <= n < 1 << 62 for n in (begin, end, *row["shape"])
        ):
            raise _damaged(path, f"its table makes no sense at {name[:80]!r}")
        if begin != offset or end - begin != math.prod(row["shape"]) * width:
            raise _damaged(path, f"its table contradicts itself at {name!r}")
        offset = end
    if offset != size - start:
        raise _damaged(path, f"it holds {size - start} bytes of tensors where {offset} are due")
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = {}
    for name, row in rows:
        begin, end = row["data_offsets"]
        raw = _room(end - begin, path)
        view = raw.numpy().data
        if end > begin and file.readinto(view) != end - begin:  # type: ignore[attr-defined]
            raise _damaged(path, f"it ends within {name!r}")
        digest.update(view)
        tensors[name] = raw.view(headers.DTYPES[row["dtype"]]).reshape(row["shape"])
    if metadata.get("payload_sha256") != digest.hexdigest():
        raise _damaged(path, "the checksum of its tensors does not match")
    return _unpack(json.loads(structure), tensors)


def _room(size: int, path: Path) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:  # so torch says that memory is out
        raise CheckpointError(
            f"{path} holds a tensor of {size} bytes, more than this machine has memory for"
        ) from error


def _read_header(
    file: BinaryIO, path: Path, size: int
) -> tuple[dict[str, Any], dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, headers.LARGEST):
        raise _damaged(path, "its header is not whole")
    try:
        table = json.loads(file.read(length))
        metadata = table.pop("__metadata__", None)
    except (ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, "its header cannot be read") from error
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} was not written by guywire (or by a version with another format): "
            "give a state.safetensors of a run"
        )
    if not isinstance(metadata.get("tree"), str):
        raise _damaged(path, "its structure is missing")
    return table, metadata, 8 + length


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path} is damaged ({why}): delete it and start that trial again"
    )
