"""Finished units on disk: a study that was interrupted goes on, one that is done answers at once.

A run of a study has a folder named by a hash of what its numbers depend on: the settings, the source
of the study and of the modules it names, the machinery, Guywire, torch and the bytes of its data.
Each finished unit is one JSON file there, written atomically.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import guywire
from guywire.core.errors import DataError, need
from guywire.core.writing import write_json
from guywire.lab.studies.study import MACHINERY, Study, Unit

__all__ = ["Cache", "default_folder", "fingerprint", "sweep"]

_LONG_AGO = 3600.0  # seconds; no file of a study takes so long to write


def default_folder() -> Path:
    """Return where finished units are kept: ``$GUYWIRE_CACHE``, or the user's cache folder.

    Returns:
        The folder, which need not exist.
    """
    if named := os.environ.get("GUYWIRE_CACHE"):
        return Path(named)
    return Path(need("platformdirs", extra="cli").user_cache_dir("guywire"))


def fingerprint(study: Study, module: ModuleType, settings: Mapping[str, Any]) -> str:
    """Return the hash of everything that the study's numbers depend on, less seeds.

    Args:
        study: the study.
        module: the file it stands in.
        settings: as resolved.

    Returns:
        A hexadecimal SHA-256.

    Raises:
        DataError: a data file cannot be read.
    """
    digest = hashlib.sha256()
    versions = [MACHINERY, guywire.__version__, torch.__version__]
    digest.update(json.dumps([study.slug, versions, settings], sort_keys=True).encode())
    for name in ("", *study.code):
        source = module if not name else importlib.import_module(name)
        digest.update(inspect.getsource(source).encode())
    for path in study.inputs(settings) if study.inputs else ():
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"the data file {path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def sweep(*folders: Path) -> None:
    """Remove what writers left that were killed long ago; others may be writing there right now.

    Args:
        folders: where.
    """
    for path in (p for folder in folders for p in folder.glob(".*.tmp")):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _LONG_AGO:
                path.unlink()


class Cache:
    """The folder of one run of a study.

    Args:
        root: of all caches.
        slug: of the study.
        key: its fingerprint.
    """

    def __init__(self, root: Path, slug: str, key: str) -> None:
        self.folder = root / "studies" / slug / key[:20]
        self.files = self.folder / "files"

    def open(self, *, fresh: bool = False) -> None:
        """Make the folder, or, for a fresh run, empty it.

        Args:
            fresh: forget what is there.
        """
        if fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.files.mkdir(parents=True, exist_ok=True)
        sweep(self.folder, self.files)

    def get(self, unit: Unit) -> dict[str, Any] | None:
        """Return the record of a finished unit.

        Args:
            unit: the unit.

        Returns:
            The record; ``None`` if the unit is not finished, its record is damaged, or a file that
            it left is gone.
        """
        try:
            record = json.loads(self._path(unit).read_text(encoding="utf-8"))
            there = all((self.files / name).exists() for name in record["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if there else None

    def put(self, unit: Unit, record: Mapping[str, Any]) -> None:
        """Remember a finished unit.

        Args:
            unit: the unit.
            record: its rows, files and cost.
        """
        write_json(self._path(unit), dict(record), durable=False)

    def _path(self, unit: Unit) -> Path:
        identity = [unit.function, unit.condition, unit.seed, dict(unit.arguments)]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{unit.function}-seed{unit.seed}-{digest[:20]}.json"
