"""``hf:NAME``: data sets of the Hugging Face hub, its cache, and local folders in its layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from guywire.core.errors import DataError, UsageError, need
from guywire.lab.streams.columns import Columns, columns_table, find_columns
from guywire.lab.streams.config import StreamConfig
from guywire.lab.streams.tables import TEST, TRAIN, VALID, Table

__all__ = ["hub_table"]

_PARTS = {"train": TRAIN, "validation": VALID, "valid": VALID, "dev": VALID, "test": TEST}


def hub_table(name: str, config: StreamConfig) -> Table:
    """Read a data set through the package ``datasets``.

    Its parts ``train``, ``validation`` and ``test`` are kept apart; a test part without labels is
    not used, and then its validation part is tested on.

    Args:
        name: ``owner/name``, ``owner/name:config`` or a local folder, as ``load_dataset`` takes it,
            or one that ``save_to_disk`` wrote.
        config: the settings.

    Returns:
        The table; images are decoded when they are fetched.

    Raises:
        MissingExtraError: ``datasets`` is not installed.
        DataError: the data set cannot be loaded, from the hub or from the cache.
        UsageError: a column is missing.
    """
    datasets = need("datasets", extra="hf")
    parts = _load(datasets, name)
    if not any(_PARTS.get(key) == TRAIN for key in parts) and len(parts) > 1:
        raise UsageError(
            f"hf:{name} has the parts {', '.join(parts)} and none called train: a stream needs one"
        )
    if len(parts) == 1:
        parts = {"train": next(iter(parts.values()))}
    parts = {key: data for key, data in parts.items() if key in _PARTS}
    first = parts["train"]
    columns = find_columns(config, first.column_names, f"hf:{name}")
    notes = []
    if _unlabelled(parts.get("test"), columns):
        del parts["test"]
        validation = next((key for key in parts if _PARTS[key] == VALID), None)
        if validation is not None:
            parts["test"] = parts.pop(validation)
        notes.append("the data set's test part has no labels and was left out")
    import pyarrow as pa

    tables, codes = [], []
    for key, data in parts.items():
        if absent := [c for c in columns.names if c not in data.column_names]:
            raise DataError(f"the part {key!r} of hf:{name} has no column {absent[0]!r}")
        tables.append(data.select_columns(columns.names).with_format("arrow")[:])
        codes.append(np.full(data.num_rows, _PARTS[key], dtype=np.int8))
    feature = first.features[columns.label]
    table = columns_table(
        pa.concat_tables(tables, promote_options="default"),
        columns,
        config,
        f"hf:{name}",
        class_names=tuple(feature.names) if hasattr(feature, "names") else None,
        part=np.concatenate(codes) if len(codes) > 1 else None,
        file_of=_within(_roots(datasets, name)),
    )
    return table if not notes else _with_notes(table, notes)


def _roots(datasets: Any, name: str) -> list[Path]:
    """Return the folders in which a data set may keep images as files of their own."""
    settings = datasets.config
    homes = (settings.HF_CACHE_HOME, settings.HF_DATASETS_CACHE)
    folder = Path(name).expanduser()
    return [Path(home).resolve() for home in (*homes, *([folder] if folder.is_dir() else []))]


def _within(roots: list[Path]) -> Callable[[str], Path]:
    def file_of(path: str) -> Path:
        file = Path(path).resolve()
        if not any(file.is_relative_to(root) for root in roots):
            raise DataError(
                f"the image {path} lies outside the data set's folder and the cache: it is not read"
            )
        return file

    return file_of


def _load(datasets: Any, name: str) -> dict[str, Any]:
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
            loaded = (
                datasets.load_from_disk(str(folder))
                if saved
                else datasets.load_dataset(str(folder))
            )
        else:
            path, _, variant = name.partition(":")
            loaded = datasets.load_dataset(path, variant or None)
    except Exception as error:  # the library raises whatever its many back ends raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"the data set 'hf:{name}' cannot be loaded from the hub, its cache or a folder of that "
            f"name: {reason}"
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _unlabelled(data: Any, columns: Columns) -> bool:
    if data is None or columns.label not in data.column_names:
        return data is not None
    labels = data.select_columns([columns.label]).with_format("arrow")[:].column(0).to_pylist()
    return all(label is None or label == -1 for label in labels)


def _with_notes(table: Table, notes: list[str]) -> Table:
    from dataclasses import replace

    return replace(table, notes=(*table.notes, *notes))
