"""Files, written so that a reader never meets half of one.

Every writer here makes a temporary file in the same folder, flushes it to the disk, renames it over
the target and flushes the folder. A crash, a kill or a full disk leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from guywire.core.errors import CheckpointError, need

__all__ = [
    "cannot_write",
    "replacing",
    "write_bytes",
    "write_json",
    "write_parquet",
    "write_text",
]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that takes the place of another, all at once, when the block ends without an error.

    Until then it has another name in the same folder, and an error removes it.

    Args:
        path: the file to replace, or to make; its folder must exist.
        durable: flush to the disk before renaming; leave out for files that only inform.

    Yields:
        The file, open for writing.

    Raises:
        CheckpointError: it cannot be written; what was there before still is.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers"
        >>> with replacing(path) as file:
        ...     _ = file.write(b"1 2")
        ...     path.exists()
        False
        >>> path.read_bytes()
        b'1 2'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            _flush_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise cannot_write(path, error) from error
    except BaseException:
        _remove(temporary)
        raise


def write_bytes(path: str | os.PathLike[str], data: bytes, *, durable: bool = True) -> None:
    """Write a file atomically.

    Args:
        path: the file; its folder must exist.
        data: what to write.
        durable: flush to the disk before renaming; leave out for files that only inform.

    Raises:
        CheckpointError: it cannot be written; what was there before still is.
    """
    with replacing(path, durable=durable) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str, *, durable: bool = True) -> None:
    """Write a text file (UTF-8) atomically.

    Args:
        path: the file; its folder must exist.
        text: what to write.
        durable: as in :func:`write_bytes`.

    Raises:
        CheckpointError: it cannot be written; what was there before still is.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"cannot write {str(path)!r}: {text[error.start : error.end]!r} in it is no Unicode: "
            "rename the file or folder whose name it is from"
        ) from error
    write_bytes(path, data, durable=durable)


def write_json(path: str | os.PathLike[str], value: Any, *, durable: bool = True) -> None:
    """Write a JSON file atomically. NaN and infinity become ``null``: JSON has neither.

    Args:
        path: the file; its folder must exist.
        value: dicts, lists, strings, numbers, booleans and ``None``.
        durable: as in :func:`write_bytes`.

    Raises:
        CheckpointError: it cannot be written; what was there before still is.
    """
    text = json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a file's name that is no UTF-8, say
        text = json.dumps(_finite(value), indent=2, allow_nan=False)
    write_text(path, text + "\n", durable=durable)


def write_parquet(path: str | os.PathLike[str], columns: dict[str, Any]) -> None:
    """Write a parquet file atomically.

    Args:
        path: the file; its folder must exist.
        columns: column names to sequences, numpy arrays or pyarrow arrays of one length.

    Raises:
        CheckpointError: it cannot be written; what was there before still is.
        MissingExtraError: pyarrow is not installed.
    """
    arrow = need("pyarrow", extra="cli")
    parquet = need("pyarrow.parquet", extra="cli")
    try:
        table = arrow.table(columns)
    except (arrow.ArrowException, OverflowError) as error:
        raise CheckpointError(
            f"cannot write {path}: what it is made of makes no column ({str(error)[:200]}); a file "
            "that it was read from is damaged"
        ) from error
    with replacing(path) as file:
        parquet.write_table(table, file, compression="zstd")


def cannot_write(path: str | os.PathLike[str], error: OSError) -> CheckpointError:
    """Say what was not written, why, and what helps.

    Args:
        path: the file or folder.
        error: what the system said.

    Returns:
        The error to raise.

    Example:
        >>> print(cannot_write("a.json", OSError(errno.EROFS, "Read-only file system")))
        cannot write a.json: Read-only file system; what was there before is untouched: make its \
folder writable or choose another
    """
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        remedy = "its folder has vanished: put it back, or choose another"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = "what was there before is untouched: make its folder writable or choose another"
    else:
        remedy = "what was there before is untouched: free some space or choose another folder"
    return CheckpointError(f"cannot write {path}: {error.strerror or error}; {remedy}")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    # Some file systems cannot flush a folder; the rename is atomic all the same.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
