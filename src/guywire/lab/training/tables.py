"""Tables of settings: read from TOML that may be malformed, written, merged and compared."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from guywire.core.errors import DataError, UsageError, need

__all__ = ["differences", "merge", "parse_toml", "read_toml", "to_toml"]

_LARGEST_FILE = 1 << 20
_LONG_KEY = re.compile(
    r"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){32}""", re.ASCII
)


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.

    Returns:
        Its tables.

    Raises:
        UsageError: there is no such file.
        DataError: it is not TOML.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
        if len(data) > _LARGEST_FILE:
            raise DataError(f"{path} is too large for settings: give a file below 1 MiB")
        return parse_toml(data.decode())
    except FileNotFoundError as error:
        raise UsageError(f"there is no config file {path}: check the path") from error
    except OSError as error:
        raise UsageError(f"cannot read the config file {path}: {error.strerror}") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path} is not TOML ({error}): correct that line") from error


def parse_toml(text: str) -> dict[str, Any]:
    """Read TOML that may be malformed.

    Args:
        text: the TOML.

    Returns:
        Its tables.

    Raises:
        ValueError: it is not TOML, or nested so deeply that nobody means it. ``tomllib`` recurses
            there, or takes memory with the square of the parts of a key.
    """
    if _LONG_KEY.search(text):
        raise ValueError("a key has more than 32 parts")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def to_toml(config: BaseModel) -> str:
    """Write settings as TOML that reads back to the same settings; ``None`` is left out.

    Args:
        config: the settings.

    Returns:
        The text.

    Raises:
        MissingExtraError: tomli-w is not installed.
    """
    return need("tomli_w", extra="cli").dumps(_without_none(config.model_dump(mode="json")))


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lay tables over each other; a later one wins, key by key, into nested tables.

    Args:
        layers: from the weakest to the strongest.

    Returns:
        A new table.

    Example:
        >>> merge({"a": 1, "t": {"x": 1, "y": 2}}, {"t": {"x": 3}})
        {'a': 1, 't': {'x': 3, 'y': 2}}
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            merged[key] = merge(old, value) if both else value  # pyright: ignore[reportArgumentType]
    return merged


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys in which two nested tables differ.

    Args:
        old: one table.
        new: the other.
        prefix: before every key.

    Returns:
        The keys, sorted.

    Example:
        >>> differences({"a": 1, "t": {"x": 1}}, {"a": 1, "t": {"x": 2}})
        ['t.x']
    """
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}")
    return found


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
