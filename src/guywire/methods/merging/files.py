"""Read the checkpoints that people have: single safetensors files, and shards with an index.

Only headers are kept in memory. A tensor, or a slice of it, is read when it is asked for, straight
into the tensor that is returned: a mapped file would count as this process's memory page by page, and
a file that shrinks under a mapping kills the process, where a short read is an error with a name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from guywire.core.errors import CheckpointError, DataError, UsageError
from guywire.core.headers import DTYPES, LARGEST, MOST_DIMENSIONS

__all__ = ["Checkpoint", "Entry", "read_header", "read_json"]

_LARGEST_JSON = 256 << 20


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        name: of the tensor.
        dtype: as safetensors spells it, such as ``"BF16"``.
        shape: of the tensor.
        file: that it is in.
        offset: of its first byte in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize


class Checkpoint:
    """One model on disk: a folder, a safetensors file, or an index of shards.

    Args:
        path: of the folder (as ``save_pretrained`` writes it), file or index.

    Attributes:
        folder: that configuration and tokenizer are in.
        files: the safetensors files, in order.
        tensors: names to entries, in the order of files and of bytes in them.

    Raises:
        DataError: there is no such file, or no weights in the folder that can be read safely.
        CheckpointError: a header or an index is damaged; the sentence names the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.folder, self.files, listed = _find(self.path)
        self.tensors: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self._handles: dict[Path, int] = {}
        for file in self.files:
            entries, metadata = read_header(file)
            self.metadata |= metadata
            for name, entry in entries.items():
                if listed is not None and listed.get(name) != file:
                    continue  # a shard may hold more than its index gives away
                if name in self.tensors:
                    raise CheckpointError(
                        f"the tensor {name!r} is in {self.tensors[name].file} and in {file}: "
                        "leave one of them"
                    )
                self.tensors[name] = entry
        if listed is not None and (missing := listed.keys() - self.tensors.keys()):
            name = min(missing)
            raise CheckpointError(
                f"{listed[name]} lacks the tensor {name!r} that the index of {self.path} promises: "
                "download the checkpoint again"
            )

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def config(self) -> dict[str, Any]:
        """Return ``config.json``, empty if there is none.

        Returns:
            The configuration.

        Raises:
            CheckpointError: it is damaged.
        """
        file = self.folder / "config.json"
        return read_json(file) if file.is_file() else {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read a slice of a flattened tensor; may be called by several threads at once.

        Args:
            name: of the tensor.
            start: first element.
            stop: after the last one; the end if ``None``.

        Returns:
            The elements, in the tensor's own type, ``[stop - start]``.

        Raises:
            CheckpointError: the file ends too early.
        """
        return self.gather(name, [(start, self.tensors[name].numel if stop is None else stop)])

    def gather(self, name: str, slices: Sequence[tuple[int, int]]) -> Tensor:
        """Read slices of a flattened tensor into one; may be called by several threads at once.

        Args:
            name: of the tensor.
            slices: first element of each, and that after its last one.

        Returns:
            The elements, one slice behind the other, in the tensor's own type.

        Raises:
            CheckpointError: the file ends too early.
        """
        entry = self.tensors[name]
        count = sum(stop - start for start, stop in slices)
        try:
            out = torch.empty(count, dtype=DTYPES[entry.dtype])
        except RuntimeError as error:  # so torch says that memory is out
            raise CheckpointError(
                f"{name[:80]!r} in {entry.file} takes {count * entry.width} bytes, more than "
                "this machine has memory for"
            ) from error
        if count:
            handle, view = self._handle(entry.file), out.view(torch.uint8).numpy().data
            for start, stop in slices:
                size = (stop - start) * entry.width
                self._fill(view[:size], handle, entry, entry.offset + start * entry.width)
                view = view[size:]
        return out

    def _fill(self, view: memoryview, handle: int, entry: Entry, at: int) -> None:
        while view:
            try:
                got = os.preadv(handle, [view], at)
            except OSError as error:
                raise CheckpointError(
                    f"cannot read {entry.file}: {error.strerror}: check the disk"
                ) from error
            if not got:
                raise CheckpointError(
                    f"{entry.file} ends within {entry.name!r}: it was cut while being read"
                )
            view, at = view[got:], at + got

    def _handle(self, file: Path) -> int:
        if file not in self._handles:
            try:
                handle = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
            if self._handles.setdefault(file, handle) != handle:
                os.close(handle)  # another thread was first
        return self._handles[file]


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read and check the header of a safetensors file.

    Args:
        file: the file.

    Returns:
        Names to entries in the order of their bytes, and the metadata.

    Raises:
        CheckpointError: anything about it is not as it must be.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(first := stream.read(8), "little")
            if len(first) < 8 or length < 2 or length > min(LARGEST, size - 8):
                raise _damaged(file, "its first eight bytes do not give the length of a header")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    try:
        table = json.loads(text.decode(), object_pairs_hook=_once)
        if not isinstance(table, dict):
            raise ValueError("its header is no JSON object")
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata are no table of texts")
        rows = sorted(_rows(table, file, 8 + length), key=lambda row: row[1:])
        at = 8 + length
        for entry, begin, end in rows:
            if begin != at:
                raise ValueError(f"its tensors overlap or leave a gap before {entry.name!r}")
            at = end
        if at != size:
            raise ValueError(f"it has {size} bytes where its header wants {at}")
    except (ValueError, RecursionError) as error:  # includes broken JSON and broken UTF-8
        raise _damaged(file, str(error)) from error
    return {entry.name: entry for entry, *_ in rows}, metadata


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        file: the file.

    Returns:
        The object.

    Raises:
        CheckpointError: it cannot be read or is something else; the sentence names the file.
    """
    try:
        # A pipe or a device would never end, and a sparse file may claim terabytes.
        if not file.is_file() or file.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{file} is no file, or too large for JSON: download it again")
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__} where an object is due")
    return value


def _rows(table: dict[str, Any], file: Path, origin: int) -> Iterator[tuple[Entry, int, int]]:
    for name, row in table.items():
        if not isinstance(row, dict) or not {"dtype", "shape", "data_offsets"} <= row.keys():
            raise ValueError(f"its header does not say type, shape and place of {name!r}")
        name.encode()  # half a surrogate pair is no name
        dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name!r} has the type {dtype!r}, which torch lacks")
        if not _sizes(shape):
            raise ValueError(f"the shape of {name!r} is {str(shape)[:80]}")
        if not _sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"the offsets of {name!r} are {str(offsets)[:80]}")
        entry = Entry(name, dtype, tuple(shape), file, origin + offsets[0])
        if offsets[1] - offsets[0] != entry.numel * entry.width:
            raise ValueError(f"the offsets of {name!r} do not fit its shape {entry.shape}")
        yield entry, origin + offsets[0], origin + offsets[1]


def _sizes(value: Any) -> bool:
    # Bounded, or the product of a million huge numbers would take hours.
    return (
        isinstance(value, list)
        and len(value) <= MOST_DIMENSIONS
        and all(type(number) is int and 0 <= number < 1 << 62 for number in value)
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"its header names {twice[:80]!r} twice")
    return table


def _damaged(file: Path, why: str) -> CheckpointError:
    why = why if len(why) <= 400 else f"{why[:400]}..."
    return CheckpointError(f"{file} is no sound safetensors file: {why}; download or save it again")


def _find(path: Path) -> tuple[Path, list[Path], dict[str, Path] | None]:
    """Folder, files, and names to files where an index says so."""
    if os.path.isfile(path):
        if path.suffix == ".safetensors":
            return path.parent, [path], None
        if path.name.endswith(".safetensors.index.json"):
            return _indexed(path)
        raise UsageError(
            f"{path} is no safetensors file and no index of one: pickled weights can run anything "
            "and are never read; load the model and save it with save_pretrained"
        )
    if not os.path.isdir(path):
        raise DataError(f"there is no folder or file {path}")
    for pattern, found in (
        ("*.safetensors.index.json", _indexed),
        ("*.safetensors", lambda file: (path, [file], None)),
    ):
        files = sorted(file for file in path.glob(pattern) if file.is_file())
        preferred = [f for f in files if f.name == "model" + pattern[1:]] or files
        if len(preferred) == 1:
            return found(preferred[0])
        if preferred:
            raise UsageError(
                f"{path} holds {', '.join(f.name for f in files[:4])}: name the one that is meant"
            )
    pickles = [f.name for p in ("*.bin", "*.pt", "*.pth") for f in sorted(path.glob(p))]
    if pickles:
        raise DataError(
            f"{path} holds pickled weights only ({pickles[0]}), which can run anything and are never "
            "read: load the model and save it with save_pretrained"
        )
    raise DataError(f"there are no safetensors files in {path}")


def _indexed(index: Path) -> tuple[Path, list[Path], dict[str, Path]]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} has no weight_map: it is no index of shards")
    for name, file in listed.items():
        # A name that leads elsewhere would let an index read any file.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{index} puts {name[:80]!r} into {str(file)[:80]!r}: that is no file beside it"
            )
        if not os.path.isfile(index.parent / file):  # Path.is_file raises at a name too long
            raise CheckpointError(f"{index} names the shard {file[:80]!r}, which is not there")
    files = [index.parent / name for name in sorted(set(listed.values()))]
    return index.parent, files, {name: index.parent / file for name, file in listed.items()}
