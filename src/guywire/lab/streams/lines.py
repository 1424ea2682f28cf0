"""Lines of text files, plain or gzipped, from people who need not be trusted.

A gzip file of a megabyte may unpack to a gigabyte, and a line may never end: both are refused.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from guywire.core.errors import DataError

__all__ = ["text_lines"]

_LONGEST = 16 << 20
# Prose packs to a third or a quarter, log files to a fiftieth.
_RATIO = 250
_SMALL = 32 << 20
_LINE = 32  # what an empty line counts for: it takes time and memory, too


def text_lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the lines of a text file, their ends included.

    Args:
        path: the file; gzipped if it ends in ``.gz``.
        encoding: of the text.

    Yields:
        Lines.

    Raises:
        DataError: the file cannot be read, is damaged, is no text, has a line of more than 16 MiB,
            or unpacks to more than 250 times its size.
    """
    zipped = path.suffix == ".gz"
    opener = gzip.open if zipped else open
    taken = 0
    try:
        most = max(_SMALL, _RATIO * path.stat().st_size)
        with opener(path, "rt", encoding=encoding, newline="") as file:
            while line := file.readline(_LONGEST + 1):
                taken += len(line) + _LINE
                if len(line) > _LONGEST:
                    raise DataError(
                        f"{path} has a line of more than 16 MiB: it is no text by lines"
                    )
                if zipped and taken > most:
                    raise DataError(
                        f"{path} unpacks to more than {_RATIO} times its size: it is no text, or "
                        "unpack it yourself"
                    )
                yield line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
