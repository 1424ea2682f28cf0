"""The compressed delta: the values that survive, and the seed that says where they belong."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from guywire.core.errors import CheckpointError, DataError
from guywire.core.headers import DTYPES
from guywire.methods.merging import edits
from guywire.methods.merging._delta_checks import check_about
from guywire.methods.merging._editor import Editor
from guywire.methods.merging._output import Target, layout_rows
from guywire.methods.merging._threads import Threads
from guywire.methods.merging.files import read_header
from guywire.methods.merging.matching import Item, Plan

DELTA = "delta.safetensors"
_FORMAT = "guywire-delta-1"
_COPY = 1 << 22


def write_delta(
    target: Target,
    editor: Editor,
    made: Plan,
    recipe: dict[str, Any],
    pool: Threads,
    say: Any,
) -> int:
    """Write the delta of a plan into the work folder.

    For each tensor the file holds the *result's* values at the positions that survive (whole pieces
    where nothing was pruned), so that restoring is copying and cannot round. For each piece the header
    holds how many values there are and a checksum of the base's piece.

    Args:
        target: of the merge.
        editor: of the merge.
        made: the plan.
        recipe: what was done.
        pool: of threads.
        say: told how far it is.

    Returns:
        Bytes of the file.
    """
    total, done = sum(item.numel for item in made.items), 0
    payload = target.work / f"{DELTA}.values"
    rows: list[tuple[str, str, tuple[int, ...]]] = []
    files: dict[str, list[dict[str, Any]]] = {}
    with payload.open("w+b") as stream:
        for file, items in made.files.items():
            files[file] = []
            for item in _wide_first(items):
                row, values = _row(item), 0
                begin = stream.tell()
                changed = False
                for data, count, crc, differs in pool.map(
                    lambda piece, item=item: _piece(editor, item, *piece), editor.pieces(item)
                ):
                    stream.write(data)
                    row["pieces"].append([count, crc])
                    values += count
                    changed = changed or differs
                if not changed:
                    stream.seek(begin)
                    stream.truncate()
                    row["same"], values = True, 0
                rows.append((item.name, item.dtype, (values,)))
                files[file].append(row)
                done += item.numel
                say("writing", done, total)
        about = {
            "format": _FORMAT, "recipe": recipe, "rate": editor.rate, "seed": editor.seed,
            "metadata": made.metadata, "files": files,
        }  # fmt: skip
        size = _assemble(target.work / DELTA, stream, rows, about)
    payload.unlink()
    return size


class Delta:
    """A compressed delta that was written before.

    Args:
        path: of its folder or file.

    Attributes:
        file: with the values.
        about: what its header says.

    Raises:
        DataError: there is none, or it is another kind of file.
        CheckpointError: it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = Path(path)
        if self.file.is_dir():
            self.file /= DELTA
        if not self.file.is_file():
            raise DataError(f"there is no compressed delta at {path}: --delta-only makes one")
        self.entries, metadata = read_header(self.file)
        if "guywire_delta" not in metadata:
            raise DataError(f"{self.file} is no compressed delta: --delta-only makes one")
        text = metadata["guywire_delta"]
        try:
            if hashlib.sha256(text.encode()).hexdigest() != metadata.get("header_sha256"):
                raise ValueError("the checksum of its header does not match")
            if self._payload() != metadata.get("payload_sha256"):
                raise ValueError("the checksum of its values does not match")
            about: Any = json.loads(text)
            if not isinstance(about, dict):
                raise ValueError("its header is no table")
            if about.get("format") != _FORMAT:
                raise ValueError(
                    f"its format is {about.get('format')!r:.80}, this reads {_FORMAT!r}"
                )
            check_about(about, self.entries)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.file}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.file} is damaged: {error}; copy it again") from error
        self.about: dict[str, Any] = about

    def _payload(self) -> str:
        digest = hashlib.sha256()
        first = min((e.offset for e in self.entries.values()), default=self.file.stat().st_size)
        with self.file.open("rb") as stream:
            stream.seek(first)
            for block in _blocks(stream):
                digest.update(block)
        return digest.hexdigest()


def positions(row: dict[str, Any], rate: float, seed: int, start: int, stop: int) -> Tensor | None:
    """Return where a piece's values belong, ``None`` for everywhere.

    Args:
        row: of the tensor, from the header.
        rate: of the drop.
        seed: of the drop.
        start: first element of the piece.
        stop: after the last one.

    Returns:
        Positions in the piece, int64, increasing.
    """
    if not row["pruned"] or rate == 0.0 or stop > row["common"]:
        return None
    size = 1
    for side in row["shape"]:
        size *= side
    kept = [edits.draw(row["mask"], i, rate, seed, size, start, stop) for i in row["models"]]
    return edits.touched(kept, stop - start)


def crc_of(values: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    return zlib.crc32(values.view(torch.uint8).numpy().data) if values.numel() else 0


def _wide_first(items: list[Item]) -> list[Item]:
    return sorted(items, key=lambda item: -DTYPES[item.dtype].itemsize)


def _row(item: Item) -> dict[str, Any]:
    return {
        "name": item.name,
        "dtype": item.dtype,
        "shape": list(item.shape),
        "base": None if item.base is None else item.base.name,
        "pruned": item.pruned,
        "mask": item.mask,
        "models": [part.model for part in item.parts],
        "common": item.common,
        "same": False,
        "pieces": [],
    }


def _piece(
    editor: Editor, item: Item, start: int, stop: int
) -> tuple[bytes, int, int | None, bool]:
    values, where = editor.edit(item, start, stop, places=True)
    before, crc = None, None
    if item.base is not None and start < item.base.numel:
        before = editor.base.read(item.base.name, start, min(stop, item.base.numel))
        crc = crc_of(before)
    if where is not None:
        values = values.index_select(0, where)
        # Survivors are stored even if they equal the base: their places follow from the seed.
        differs = len(where) > 0
    else:
        differs = (
            before is None
            or len(before) != len(values)
            or not torch.equal(before.view(torch.uint8), values.view(torch.uint8))
        )
    data = values.view(torch.uint8).numpy().tobytes() if values.numel() else b""
    return data, len(values), crc, differs


def _assemble(
    path: Path,
    payload: BinaryIO,
    rows: list[tuple[str, str, tuple[int, ...]]],
    about: dict[str, Any],
) -> int:
    text = json.dumps(about, separators=(",", ":"))
    digest = hashlib.sha256()
    payload.seek(0)
    for block in _blocks(payload):
        digest.update(block)
    metadata = {
        "guywire_delta": text,
        "header_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "payload_sha256": digest.hexdigest(),
    }
    header, _, size = layout_rows(rows, metadata, keep_order=True)
    payload.seek(0)
    with path.open("wb") as file:
        file.write(header)
        for block in _blocks(payload):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return size


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    while block := stream.read(_COPY):
        yield block
