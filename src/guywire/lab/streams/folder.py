"""A folder of images, a sub-folder a class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from guywire.core.errors import DataError, UsageError
from guywire.lab.streams.config import StreamConfig
from guywire.lab.streams.images import decode, stack
from guywire.lab.streams.tables import TEST, TRAIN, VALID, Table

__all__ = ["folder_table"]

_ENDINGS = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
)
_PARTS = {"train": TRAIN, "valid": VALID, "val": VALID, "validation": VALID, "test": TEST}


def folder_table(root: Path, config: StreamConfig) -> Table:
    """List the images under ``CLASS/``, or ``DOMAIN/CLASS/`` in the scenario ``domain``.

    Either may stand under ``train/``, ``valid/`` and ``test/``. Hidden files, files that are no
    images by their ending, and links that lead out of the folder are passed over. Domains come in
    the order of their names.

    Args:
        root: the folder.
        config: the settings.

    Returns:
        The table; images are decoded when they are fetched.

    Raises:
        UsageError: no images are where they should be.
        DataError: when fetched, an image cannot be decoded; the message names it.
    """
    inside, notes = Path(os.path.realpath(root)), []
    top = _folders(root)
    parts = {f: _PARTS[f.name.lower()] for f in top if f.name.lower() in _PARTS}
    if TRAIN not in parts.values():
        parts = {}
    files: list[Path] = []
    columns: list[tuple[str, str, int]] = []
    left_out = 0
    for base, part in parts.items() or [(root, TRAIN)]:
        domains = _folders(base) if config.scenario == "domain" else [base]
        for domain in domains:
            for group in _folders(domain):
                found, outside = _images(group, inside)
                files += found
                left_out += outside
                columns += [(group.name, domain.name, part)] * len(found)
    if not files:
        if any(root.rglob("*.parquet")):
            raise UsageError(f"{root} holds parquet files: name one of them, or say hf:{root}")
        layout = "DOMAIN/CLASS/" if config.scenario == "domain" else "CLASS/"
        raise UsageError(
            f"no images were found under {root}/{layout} ({len(top)} sub-folders, endings "
            f"{' '.join(sorted(_ENDINGS))}): put each class in a folder of its own"
        )
    if left_out:
        notes.append(f"{left_out} links that lead out of the folder were passed over")
    names = sorted({name for name, _, _ in columns})
    places = list(dict.fromkeys(place for _, place, _ in columns))

    return Table(
        name=root.name,
        kind="image",
        labels=np.array([names.index(name) for name, _, _ in columns], dtype=np.int64),
        class_names=tuple(names),
        fetch=lambda rows: stack(
            (decode(files[i], str(files[i]), config.image_size) for i in rows), root.name
        ),
        domains=np.array([places.index(place) for _, place, _ in columns], dtype=np.int64)
        if config.scenario == "domain"
        else None,
        domain_names=tuple(places) if config.scenario == "domain" else (),
        part=np.array([part for _, _, part in columns], dtype=np.int8) if parts else None,
        notes=tuple(notes),
    )


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(
            f for f in folder.iterdir() if f.is_dir() and not f.is_symlink() and f.name[0] != "."
        )
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error


def _images(folder: Path, inside: Path) -> tuple[list[Path], int]:
    found, outside = [], 0
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            file = Path(path) / name
            if name.startswith(".") or file.suffix.lower() not in _ENDINGS:
                continue
            # Not Path.resolve, which raises where links go in circles; a pipe would never end.
            if not Path(os.path.realpath(file)).is_relative_to(inside):
                outside += 1
            elif os.path.isfile(file) or not os.path.exists(file):
                found.append(file)
    return found, outside
