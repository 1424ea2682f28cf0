"""Settings of a comparison: from a file, from flags, and from the run that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from guywire.core.errors import UsageError

if TYPE_CHECKING:
    from guywire.lab.training.config import CompareConfig

__all__ = ["options", "resources", "settle"]


def settle(file: Path | None, flags: dict[str, Any], *, resume: bool) -> CompareConfig:
    """Lay flags over a file, or over the settings of the run that is resumed.

    Args:
        file: a TOML file, if one was named.
        flags: settings, with ``None`` where no flag was given.
        resume: go on with the run in ``out``.

    Returns:
        The settings.

    Raises:
        UsageError: a setting is unknown or makes no sense, or there is no run to resume.
        DataError: the file is not TOML, or the run's settings were damaged.
    """
    from guywire.lab.training import config as settings
    from guywire.lab.training import tables
    from guywire.lab.training.run import RunFolder

    given = _given(flags)
    base: dict[str, Any] = {} if file is None else tables.read_toml(file)
    where = "" if file is None else str(file)
    if file is not None:
        settings.parse(settings.CompareConfig, base, where)
    if resume:
        out = given.get("out") or base.get("out")
        if out is None:
            raise UsageError("--resume needs the folder of the run: add --out FOLDER")
        if file is None:
            stored = RunFolder(Path(out)).stored()
            if stored is None and not given.keys() - {"out", "workers", "track"}:
                raise UsageError(
                    f"there is no run to resume in {out}: check the path, or name the settings again "
                    "(with them, --resume starts a run where there is none)"
                )
            base = stored or {}
    return settings.parse(settings.CompareConfig, tables.merge(base, given))


def options(words: list[str]) -> dict[str, Any]:
    """Read the words of ``--option``.

    Args:
        words: each ``METHOD.OPTION=VALUE``; what is no TOML value is a string.

    Returns:
        Methods to options to values.

    Raises:
        UsageError: a word is something else, or contradicts another.

    Example:
        >>> options(["ewc.strength=1e3", "replay.buffer=balanced"])
        {'ewc': {'strength': 1000.0}, 'replay': {'buffer': 'balanced'}}
    """
    from guywire.lab.training.tables import parse_toml

    table: dict[str, Any] = {}
    for word in words:
        left, equals, right = word.partition("=")
        *path, key = left.strip().split(".")
        if not equals or not path or not all((*path, key)):
            raise UsageError(f"--option {word}: write METHOD.OPTION=VALUE, as ewc.strength=1000")
        try:
            value = parse_toml(f"x = {right}")["x"]
        except ValueError:
            value = right  # a word needs no quotes here
        home: Any = table
        for part in path:
            home = home.setdefault(part, {})
            if not isinstance(home, dict):
                raise UsageError(f"--option {word}: {part!r} has a value already, and no options")
        home[key] = value
    return table


def resources(word: str | None) -> dict[str, Any]:
    """Read the word of ``--resources``.

    Args:
        word: JSON, or ``None``.

    Returns:
        The table ``[ray]``; empty without a word.

    Raises:
        UsageError: it is no JSON, or asks for what cannot be.
    """
    from guywire.lab.training.ray_settings import parse_resources

    return {} if word is None else parse_resources(word)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    given = {}
    for key, value in flags.items():
        if isinstance(value, dict):
            value = _given(value) or None
        if value is not None:
            given[key] = value
    return given
