"""Tables with columns (parquet files, hub data sets): find the columns, read what is in them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from guywire.core.errors import DataError, UsageError
from guywire.lab.streams.config import StreamConfig
from guywire.lab.streams.images import decode, fitted, stack
from guywire.lab.streams.tables import Table, encode

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Columns", "columns_table", "find_columns"]

_USUAL = {
    "image": ("image", "images", "img", "pixels"),
    "text": ("text", "sentence", "content"),
    "label": ("label", "labels", "class", "target", "fine_label"),
    "domain": ("domain",),
}


@dataclass(frozen=True)
class Columns:
    """Which column holds what.

    Attributes:
        kind: ``image`` or ``text``.
        inputs: one column of images, or one or several of text that are joined.
        label: of classes.
        domain: of domains, or ``None``.
        subject: of subjects, or ``None``.
    """

    kind: str
    inputs: tuple[str, ...]
    label: str
    domain: str | None
    subject: str | None

    @property
    def names(self) -> list[str]:
        """Every column, once."""
        every = [*self.inputs, self.label, self.domain, self.subject]
        return list(dict.fromkeys(name for name in every if name is not None))


def find_columns(config: StreamConfig, present: Sequence[str], name: str) -> Columns:
    """Match the settings, or the usual names, with the columns that are there.

    Args:
        config: the settings.
        present: names of columns.
        name: of the data, for errors.

    Returns:
        The columns.

    Raises:
        UsageError: one is missing; the message lists those that come near, and the flag.
    """
    if config.image_column is not None and config.text_column is not None:
        raise UsageError(
            f"both an image column ({config.image_column!r}) and a text column "
            f"({config.text_column!r}) are given: a stream is of one kind, so give one"
        )

    def find(role: str, given: str | None) -> str | None:
        if given is not None:
            if given not in present:
                raise _missing(role, given, present, name)
            return given
        return next((usual for usual in _USUAL.get(role, ()) if usual in present), None)

    label = find("label", config.label_column)
    if label is None:
        raise _missing("label", None, present, name)
    domain = config.domain_column
    if config.scenario == "domain":
        domain = find("domain", domain)
        if domain is None:
            raise _missing("domain", None, present, name)
    elif domain is not None and domain not in present:
        raise _missing("domain", domain, present, name)
    subject = find("subject", config.subject_column)
    if config.text_column is not None:
        joined = [config.text_column]
        if config.text_column not in present:
            joined = [part.strip() for part in config.text_column.split("+")]
        inputs = tuple(c for part in joined if (c := find("text", part)) is not None)
        return Columns("text", inputs, label, domain, subject)
    if (image := find("image", config.image_column)) is not None:
        return Columns("image", (image,), label, domain, subject)
    if (text := find("text", None)) is not None:
        return Columns("text", (text,), label, domain, subject)
    raise _missing("image", None, present, name)


def columns_table(
    table: pa.Table,
    columns: Columns,
    config: StreamConfig,
    name: str,
    *,
    class_names: tuple[str, ...] | None = None,
    part: np.ndarray | None = None,
    file_of: Callable[[str], Path] | None = None,
) -> Table:
    """Make a table of tasks-to-be from an Arrow table.

    Args:
        table: with at least the columns named.
        columns: which are which.
        config: the settings.
        name: of the data.
        class_names: where labels are indices into known names.
        part: which part of the data each row is in, if the data say.
        file_of: gives the file of an image that is stored as a path; without it such are refused.

    Returns:
        The table.

    Raises:
        DataError: a label, domain or subject is missing or of a wrong type; when fetched, an image
            or text is.
    """
    if table.num_rows == 0:
        raise DataError(f"{name} has no rows")
    labels, names = encode(table.column(columns.label).to_pylist(), f"column {columns.label!r}")
    if class_names is not None:
        labels = np.array([int(names[code]) for code in labels], dtype=np.int64)
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise DataError(
                f"column {columns.label!r} of {name} holds classes {labels.min()} to "
                f"{labels.max()}, outside its {len(class_names)} names"
            )
        names = class_names
    domains, domain_names = None, ()
    if columns.domain is not None and config.scenario == "domain":
        domains, domain_names = _in_order(table, columns.domain)
    subjects = None
    if columns.subject is not None:
        subjects, _ = encode(
            table.column(columns.subject).to_pylist(), f"column {columns.subject!r}"
        )

    def images(rows: np.ndarray) -> Tensor:
        values = table.column(columns.inputs[0]).take(rows)
        where = f"column {columns.inputs[0]!r} of {name}"
        return stack(
            (
                _image(value.as_py(), f"row {row} of {where}", config.image_size, file_of)
                for row, value in zip(rows, values, strict=True)
            ),
            name,
        )

    def texts(rows: np.ndarray) -> tuple[str, ...]:
        parts = [table.column(c).take(rows).to_pylist() for c in columns.inputs]
        return tuple(
            _text(cells, f"row {row} of column {'+'.join(columns.inputs)!r} of {name}")
            for row, cells in zip(rows, zip(*parts, strict=True), strict=True)
        )

    return Table(
        name=name,
        kind="image" if columns.kind == "image" else "text",
        labels=labels,
        class_names=names,
        fetch=images if columns.kind == "image" else texts,
        domains=domains,
        domain_names=domain_names,
        subjects=subjects,
        part=part,
    )


def _in_order(table: pa.Table, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Number domains by first appearance, integers too."""
    values = [None if v is None else str(v) for v in table.column(column).to_pylist()]
    return encode(values, f"column {column!r}")


def _text(cells: Sequence[Any], where: str) -> str:
    for cell in cells:
        if cell is not None and not isinstance(cell, str):
            raise DataError(f"{where} holds {type(cell).__name__}, not text")
    return ", ".join(cell for cell in cells if cell)


def _image(
    value: Any, where: str, size: int | None, file_of: Callable[[str], Path] | None
) -> np.ndarray:
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path") and file_of is not None:
            return decode(file_of(value["path"]), where, size)
        value = value.get("bytes")
        if value is None:
            raise DataError(f"{where} holds no bytes of an image: embed the files in the table")
    if isinstance(value, bytes):
        return decode(value, where, size)
    if isinstance(value, list):
        return _array(value, where, size)
    raise DataError(
        f"{where} holds {'nothing' if value is None else type(value).__name__}, not an image "
        "(bytes of a file, a struct with 'bytes', or lists of numbers)"
    )


def _array(value: list[Any], where: str, size: int | None) -> np.ndarray:
    """Bring nested lists of pixels into ``[H, W]`` or ``[H, W, 3]``."""
    import torch

    pixels: np.ndarray[Any, Any]
    try:
        pixels = np.array(value)
    except ValueError as error:
        raise DataError(f"{where} holds lists of unequal length") from error
    if pixels.dtype.kind not in "iuf":
        raise DataError(f"{where} holds {pixels.dtype}, not numbers of an image")
    if pixels.ndim == 1:
        side = math.isqrt(len(pixels))
        if side * side != len(pixels):
            raise DataError(f"{where} holds {len(pixels)} numbers in a row, not a square image")
        pixels = pixels.reshape(side, side)
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3) or not pixels.size:
        raise DataError(f"{where} holds numbers of shape {pixels.shape}, not an image")
    whole = pixels.dtype.kind != "f"
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= (255 if whole else 1)):  # not a number is neither
        raise DataError(
            f"{where} holds numbers from {low:g} to {high:g}: give integers within 0..255 or "
            "fractions within 0..1"
        )
    grey = pixels.ndim == 2
    bytes_ = (pixels if whole else np.rint(pixels * 255)).astype(np.uint8)
    image = torch.from_numpy(bytes_[None] if grey else bytes_.transpose(2, 0, 1).copy())
    image = fitted(image[None], size)[0].numpy()
    return image[0] if grey else image.transpose(1, 2, 0)


def _missing(role: str, given: str | None, present: Sequence[str], name: str) -> UsageError:
    if given is None:
        what, also = f"no column of {name} is known to hold the {role}s", ""
        if role == "image":
            what, also = (
                f"no column of {name} is known to hold images or texts",
                " or --text-column",
            )
        near = list(present)
    else:
        what, also = f"{name} has no {role} column {given!r}", ""
        near = difflib.get_close_matches(given, present, 3, 0.4) or list(present)
    shown = ", ".join(near[:12]) + (" ..." if len(near) > 12 else "")
    return UsageError(f"{what}: name one of {shown or 'none'} with --{role}-column{also}")
