"""What every source of data comes down to before it is cut into tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from guywire.core.errors import DataError

__all__ = ["TEST", "TRAIN", "VALID", "Table", "encode"]

TRAIN, VALID, TEST = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Table:
    """Rows that are known by number; inputs are fetched only for the rows that are kept.

    Attributes:
        name: of the data.
        kind: ``image`` or ``text``.
        labels: class of each row, an index into ``class_names``, int64 ``[N]``.
        class_names: in the data set's own order.
        fetch: gives the inputs of some rows: uint8 ``[n, C, H, W]`` or a tuple of strings.
        domains: domain of each row, an index into ``domain_names``, or ``None``.
        domain_names: in order of first appearance.
        subjects: subject of each row, or ``None``.
        part: which of ``TRAIN``, ``VALID``, ``TEST`` the data set puts each row in, or ``None``.
        notes: what a reader should know.
    """

    name: str
    kind: Literal["image", "text"]
    labels: np.ndarray
    class_names: tuple[str, ...]
    fetch: Callable[[np.ndarray], Tensor | tuple[str, ...]]
    domains: np.ndarray | None = None
    domain_names: tuple[str, ...] = ()
    subjects: np.ndarray | None = None
    part: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def encode(values: Sequence[object], what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Number values: integers by size, anything else in order of first appearance.

    Args:
        values: strings or integers (or booleans).
        what: what they are, for errors.

    Returns:
        Codes, int64 ``[N]``, and the name of each code.

    Raises:
        DataError: a value is missing, or neither a string nor an integer.

    Example:
        >>> encode(["b", "a", "b"], "labels")[1]
        ('b', 'a')
        >>> encode([10, 9, 10], "labels")[0].tolist()
        [1, 0, 1]
    """
    seen: dict[object, int] = {}
    codes = np.empty(len(values), dtype=np.int64)
    for row, value in enumerate(values):
        if value is None:
            raise DataError(f"row {row} of the {what} is empty: fill it or drop the row")
        if not isinstance(value, str | int | np.integer):
            raise DataError(
                f"row {row} of the {what} is {value!r}, neither a string nor an integer"
            )
        codes[row] = seen.setdefault(value, len(seen))
    names = list(seen)
    if all(isinstance(name, int | np.integer) for name in names):
        order = sorted(range(len(names)), key=lambda i: int(names[i]))  # pyright: ignore[reportArgumentType]
        rank = np.empty(len(names), dtype=np.int64)
        rank[order] = np.arange(len(names))
        codes = rank[codes] if len(codes) else codes
        names = [names[i] for i in order]
    return codes, tuple(str(name) for name in names)
