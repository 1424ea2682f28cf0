"""Write a merged model: a work folder beside the target, a journal, and one rename at the end.

Nothing of the target exists until all of it does. Tensors are written at their final places in files
of their final size, in any order. Each finished stretch is noted in the journal with a checksum, so
that an interrupted merge goes on where it stopped, after reading back what it finds noted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guywire.core import headers
from guywire.core.errors import CheckpointError, GuywireError, UsageError
from guywire.methods.merging._companions import RECIPE
from guywire.methods.merging.matching import Item

_JOURNAL = "journal"


class Target:
    """The folder that a merge makes.

    Args:
        out: the folder.
        sources: files and folders that must not be overwritten.
        force: replace what an earlier merge made.

    Raises:
        UsageError: the folder exists, or is one of the sources.
    """

    def __init__(self, out: Path, sources: Iterable[Path], *, force: bool, resume: bool) -> None:
        self.out = out
        self.work = out.absolute().with_name(f".{out.absolute().name}.guywire-merge")
        mine = Path(os.path.realpath(out))  # Path.resolve raises where links go in circles
        if out.is_symlink() and not out.exists():
            raise UsageError(f"{out} is a link to nothing: remove it, or give another --out")
        for source in sources:
            if Path(os.path.realpath(source)).is_relative_to(mine):
                raise UsageError(f"{source} would be overwritten by the result: give another --out")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            if not force:
                raise UsageError(f"{out} is there already: give another --out, or --force")
            if not out.is_dir() or not (out / RECIPE).is_file():
                raise UsageError(
                    f"{out} is there and was not made by a merge: remove it yourself, or give "
                    "another --out"
                )
        if self.work.exists() and not (force or resume):
            raise UsageError(
                f"an interrupted merge to {out} is there: go on with --resume, or start anew with "
                "--force"
            )
        self._lock = threading.Lock()
        self._handles: dict[str, int] = {}
        self._journal: Any = None
        self.done: dict[tuple[str, int], tuple[int, str]] = {}

    def begin(self, request: str, *, resume: bool) -> None:
        """Make the work folder, or take up an old one.

        Args:
            request: says all that the result depends on.
            resume: go on with what is there.

        Raises:
            UsageError: what is there belongs to another request.
            CheckpointError: the folder cannot be made.
        """
        if self.work.exists() and not resume:
            shutil.rmtree(self.work)
        with _writing(self.work):
            self.work.parent.mkdir(parents=True, exist_ok=True)
            self.work.mkdir(exist_ok=True)
            file = self.work / _JOURNAL
            if file.is_file():
                self._read(file, request)
            fresh = not file.is_file() or not file.stat().st_size
            self._journal = file.open("a", encoding="utf-8")
            if fresh:
                self._journal.write(json.dumps({"request": request}) + "\n")
                self._journal.flush()

    def open(self, name: str, header: bytes, size: int) -> None:
        """Make a file of its final size with its header, or open it again.

        Args:
            name: of the file.
            header: its first bytes.
            size: of the whole file.

        Raises:
            CheckpointError: it cannot be made, for want of space, say.
        """
        with _writing(self.work / name):
            handle = os.open(self.work / name, os.O_RDWR | os.O_CREAT, 0o666)
            self._handles[name] = handle
            if os.fstat(handle).st_size != size:
                os.ftruncate(handle, size)
            _allocate(handle, size)
            os.pwrite(handle, header, 0)

    def has(self, name: str, at: int, length: int) -> bool:
        """Tell whether a stretch was written before and is sound.

        Args:
            name: of the file.
            at: its first byte.
            length: in bytes.

        Returns:
            True if it need not be written again.
        """
        noted = self.done.get((name, at))
        if noted is None or noted[0] != length:
            return False
        found = os.pread(self._handles[name], length, at)
        return len(found) == length and _checksum(np.frombuffer(found, np.uint8)) == noted[1]

    def write(self, name: str, at: int, values: Tensor) -> None:
        """Write a stretch and note it; may be called by several threads at once.

        Args:
            name: of the file.
            at: its first byte.
            values: what to write.

        Raises:
            CheckpointError: it cannot be written.
        """
        data = (
            values.contiguous().view(torch.uint8).numpy() if values.numel() else np.empty(0, "u1")
        )
        with _writing(self.work / name):
            view, place = data.data, at
            while view:
                sent = os.pwrite(self._handles[name], view, place)
                view, place = view[sent:], place + sent
            line = json.dumps([name, at, len(data), _checksum(data)])
            with self._lock:
                self._journal.write(line + "\n")
                self._journal.flush()

    def finish(self) -> None:
        """Flush everything to the disk and put it in place.

        Raises:
            CheckpointError: the disk is full, or the folder cannot be renamed.
        """
        with _writing(self.out):
            for handle in self._handles.values():
                os.fsync(handle)
            self.close()
            (self.work / _JOURNAL).unlink(missing_ok=True)
            old = self.out.absolute().with_name(f".{self.out.absolute().name}.old")
            replaces = self.out.exists() and any(self.out.iterdir())
            if replaces:
                os.rename(self.out, old)
            elif self.out.exists():
                self.out.rmdir()
            os.rename(self.work, self.out)
            with contextlib.suppress(OSError):
                handle = os.open(self.out.absolute().parent, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            if replaces:
                shutil.rmtree(old)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Close files at the end; keep the work folder only where a resume makes sense.

        Yields:
            Nothing.
        """
        try:
            yield
        except GuywireError as error:
            if not isinstance(error.__cause__, OSError):
                self.discard()  # the sources are wrong: there is nothing to go on with
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Close files; the work folder stays, for a resume."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        while self._handles:
            os.close(self._handles.popitem()[1])

    def discard(self) -> None:
        """Remove the work folder."""
        self.close()
        shutil.rmtree(self.work, ignore_errors=True)

    def _read(self, file: Path, request: str) -> None:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            try:
                value = json.loads(line)
                if number == 0:
                    if value["request"] != request:
                        raise UsageError(
                            f"the interrupted merge to {self.out} was another one (other models, "
                            "method, rate, seed, ...): start anew with --force"
                        )
                else:
                    name, at, length, check = value
                    self.done[name, at] = (length, check)
            except (ValueError, TypeError, KeyError) as error:
                if isinstance(error, UsageError):
                    raise
                break  # the line at which it was killed


def layout(items: Sequence[Item], metadata: dict[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Lay out a safetensors file.

    Args:
        items: its tensors, in order.
        metadata: texts by name.

    Returns:
        The header, names to first bytes, and the size of the file.
    """
    rows = [(item.name, item.dtype, item.shape) for item in items]
    return layout_rows(rows, metadata)


def layout_rows(
    rows: Sequence[tuple[str, str, tuple[int, ...]]],
    metadata: dict[str, str],
    *,
    keep_order: bool = False,
) -> tuple[bytes, dict[str, int], int]:
    """As :func:`layout`, from names, types and shapes."""
    table, size = headers.table_of(rows if keep_order else headers.wide_first(rows))
    header = headers.encode(table, metadata)
    offsets = {name: len(header) + row["data_offsets"][0] for name, row in table.items()}
    return header, offsets, len(header) + size


def request_of(**facts: Any) -> str:
    """Return a digest of all that a result depends on."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _allocate(handle: int, size: int) -> None:
    """Tell of a full disk at once, not at the end, where the file system can."""
    try:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


def _checksum(data: np.ndarray) -> str:
    """Xor and sum of the words: finds torn pages and flipped bits at the speed of memory."""
    whole = len(data) // 8 * 8
    words = data[:whole].view(np.uint64)
    rest = int.from_bytes(data[whole:].tobytes(), "little")
    xor = int(np.bitwise_xor.reduce(words)) if len(words) else 0
    total = int(np.add.reduce(words)) if len(words) else 0
    return f"{xor ^ rest:016x}{total:016x}"


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}: free some space or give another --out"
        ) from error
