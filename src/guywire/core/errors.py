"""The errors that Guywire raises: one sentence each, naming the value and the remedy."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "AttachError",
    "CheckpointError",
    "DataError",
    "GuywireError",
    "MissingExtraError",
    "NonFiniteError",
    "SelectionError",
    "UsageError",
    "need",
]


class GuywireError(ValueError):
    """Base of all errors that Guywire raises on purpose."""


class UsageError(GuywireError):
    """The words were wrong: an unknown name, key or flag, or a value out of range (exit code 2)."""


class SelectionError(UsageError):
    """A selection of parameters matches nothing, or cannot be read."""


class AttachError(GuywireError):
    """Wires cannot be attached, or the model changed under them."""


class CheckpointError(GuywireError):
    """A checkpoint is damaged, of another kind, or does not fit the model."""


class DataError(GuywireError):
    """Data on disk is damaged, or not what it was said to be."""


class NonFiniteError(GuywireError):
    """A loss or a tensor is NaN or infinite."""


class MissingExtraError(GuywireError, ImportError):
    """An optional package is not installed."""


def need(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        module: the module's import name, e.g. ``"transformers"``.
        extra: the extra of Guywire's that installs it, e.g. ``"hf"``.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # the package is there, something inside it is not
        raise MissingExtraError(
            f"this needs the package {module.split('.')[0]!r}, which is not installed: "
            f"pip install 'guywire[{extra}]'"
        ) from error
