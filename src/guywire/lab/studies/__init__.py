"""Studies: one file a paper, its claims in miniature and a verdict computed from the numbers."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from guywire.core.errors import UsageError

if TYPE_CHECKING:
    from guywire.lab.studies.study import Study

__all__ = ["STUDIES", "load", "module_of"]

STUDIES: dict[str, str] = {
    "alignguard-lora": "guywire.lab.studies.alignguard_lora",
    "darex": "guywire.lab.studies.darex",
    "fisher-sequential-transfer": "guywire.lab.studies.fisher_sequential_transfer",
    "half-fine-tuning": "guywire.lab.studies.half_fine_tuning",
    "i-lora": "guywire.lab.studies.i_lora",
    "mask-tuning": "guywire.lab.studies.mask_tuning",
    "pego": "guywire.lab.studies.pego",
    "pela": "guywire.lab.studies.pela",
    "rehearsal-free-cl": "guywire.lab.studies.rehearsal_free_cl",
    "sara": "guywire.lab.studies.sara",
    "stability-gap": "guywire.lab.studies.stability_gap",
}
"""Slug to module; a new study adds its line here."""


def load(name: str) -> Study:
    """Return a study.

    Args:
        name: its slug, or the path of a Python file of yours that defines ``STUDY``.

    Returns:
        The study.

    Raises:
        UsageError: there is none of that name.
    """
    study = getattr(module_of(name), "STUDY", None)
    if study is None:
        raise UsageError(f"the file {name} defines no STUDY: end it with STUDY = Study(...)")
    return study


def module_of(name: str) -> ModuleType:
    """Import the module that a study stands in.

    Args:
        name: as for :func:`load`.

    Returns:
        The module.

    Raises:
        UsageError: there is none of that name.
    """
    if name in STUDIES:
        return importlib.import_module(STUDIES[name])
    path = Path(name)
    if path.suffix != ".py":
        near = difflib.get_close_matches(name, STUDIES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(STUDIES)}"
        raise UsageError(f"no study is called {name!r}: {hint}")
    if not path.is_file():
        raise UsageError(f"there is no file {name}: give a slug or the path of a study's file")
    title = f"guywire_study_{path.stem}_{abs(hash(path.resolve())):x}"
    if title in sys.modules:
        return sys.modules[title]
    spec = importlib.util.spec_from_file_location(title, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{name} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[title]
        raise
    return module
