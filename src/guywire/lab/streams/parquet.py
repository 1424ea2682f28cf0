"""Parquet files, and ``renditions``, which is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from guywire.core.errors import DataError, need
from guywire.lab.streams.columns import columns_table, find_columns
from guywire.lab.streams.config import StreamConfig, data_folder
from guywire.lab.streams.tables import Table

__all__ = ["parquet_table", "renditions"]


def parquet_table(path: Path, config: StreamConfig, name: str | None = None) -> Table:
    """Read the columns that matter of a parquet file.

    Args:
        path: the file.
        config: the settings.
        name: of the data; the file's if ``None``.

    Returns:
        The table; images are decoded when they are fetched.

    Raises:
        DataError: the file is missing or damaged.
        UsageError: a column is missing.
    """
    need("pyarrow", extra="cli")
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = name or path.name
    try:
        with pq.ParquetFile(path) as file:
            columns = find_columns(config, file.schema_arrow.names, name)
            twice = next((c for c in columns.names if file.schema_arrow.names.count(c) > 1), None)
            if twice is not None:
                raise DataError(f"{path} has two columns {twice!r}: rename one of them")
            table = file.read(columns=columns.names)
            table.validate(full=True)  # texts that are no UTF-8, offsets that lead elsewhere
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read as a parquet file: {reason}") from error
    return columns_table(table, columns, config, name)


def renditions(config: StreamConfig) -> Table:
    """Read ``renditions.parquet``: 1,906 emoji in four styles of drawing.

    By itself classes are ``subgroup``, domains ``style`` and subjects ``codepoint``: one emoji in
    all its styles stays on one side of a split. ``text_column="caption"`` (or ``"caption+tags"``)
    makes a stream of texts; outside the scenario ``domain`` one row of each subject is then kept, as
    the four drawings of an emoji share their words.

    Args:
        config: the settings; columns that it names come first.

    Returns:
        The table.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = data_folder() / "renditions.parquet"
    if not path.is_file():
        raise DataError(
            f"{path} is missing: set GUYWIRE_DATA to the folder that holds renditions.parquet "
            "(columns image, style, codepoint, caption, group, subgroup, tags), or copy it there"
        )
    usual = {
        "label_column": "subgroup",
        "domain_column": "style",
        "subject_column": "codepoint",
        **({} if config.text_column else {"image_column": "image"}),
    }
    update = {key: value for key, value in usual.items() if getattr(config, key) is None}
    table = parquet_table(path, config.model_copy(update=update), "renditions")
    if table.kind == "text" and config.scenario != "domain" and table.subjects is not None:
        return _rows(table, np.sort(np.unique(table.subjects, return_index=True)[1]))
    return table


def _rows(table: Table, kept: np.ndarray) -> Table:
    def some(column: np.ndarray | None) -> np.ndarray | None:
        return None if column is None else column[kept]

    return replace(
        table,
        labels=table.labels[kept],
        fetch=lambda rows: table.fetch(kept[rows]),
        domains=some(table.domains),
        subjects=some(table.subjects),
        part=some(table.part),
    )
