"""What a sweep tries: options with their values or ranges, read from ``[sweep.methods]``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from guywire.core.errors import UsageError
from guywire.lab.training import arms
from guywire.lab.training.config import CompareConfig, nearest, parse
from guywire.lab.training.seeding import seed_of
from guywire.lab.training.tables import merge

__all__ = [
    "Axis",
    "Values",
    "axes_of",
    "drawn",
    "grid",
    "options_with",
    "read_axis",
    "tuned_methods",
]

Values = dict[str, Any]
"""Names of axes to values."""

_DIGITS = 6
_WIDE = 100.0


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    values: tuple[Any, ...] | None = None
    low: float | None = None
    high: float | None = None
    log: bool | None = None


@dataclass(frozen=True)
class Axis:
    """One option that a sweep moves.

    Attributes:
        name: ``option``, or ``part.option`` in a method of several parts.
        values: what may stand there; ``None`` is a range.
        low: the lowest value of a range.
        high: the highest.
        log: the range is even on a logarithmic scale.
        whole: only whole numbers.
    """

    name: str
    values: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def points(self, count: int) -> list[Any]:
        """Return values of a grid.

        Args:
            count: of a range.

        Returns:
            The values, both ends of a range among them.

        Example:
            >>> Axis("strength", low=0.01, high=100.0, log=True).points(5)
            [0.01, 0.1, 1.0, 10.0, 100.0]
        """
        if self.values is not None:
            return list(self.values)
        found = [self.at(k / (count - 1)) for k in range(count)]
        return list(dict.fromkeys(found))

    def at(self, share: float) -> Any:
        """Return the value at a share of the way from the lowest to the highest.

        Six digits are kept: enough for a strength, and the same on every machine.

        Args:
            share: between 0 and 1.

        Returns:
            The value; of a list, the one there.
        """
        if self.values is not None:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.log:
            value = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            value = self.low + share * (self.high - self.low)
        return self.rounded(value)

    def rounded(self, value: Any) -> Any:
        """Return a value as it is tried: six digits, whole if need be, within the range.

        Args:
            value: of a range; one of a list is returned as it is.

        Returns:
            The value.
        """
        if self.values is not None:
            return value
        if self.whole:
            return int(min(max(round(value), self.low), self.high))
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def described(self) -> dict[str, Any]:
        """Return the axis as ``sweep.json`` has it."""
        if self.values is not None:
            return {"name": self.name, "values": list(self.values), "log": self._spread()}
        return {"name": self.name, "low": self.low, "high": self.high, "log": self.log}

    def _spread(self) -> bool:
        numbers = [v for v in self.values or () if is_number(v)]
        if len(numbers) < len(self.values or ()) or min(numbers, default=0) <= 0:
            return False
        return max(numbers) >= 20 * min(numbers)


def is_number(value: Any) -> bool:
    """Tell whether a value is a number that stands somewhere on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def tuned_methods(config: CompareConfig) -> list[str]:
    """Return the methods that a sweep tunes, in the comparison's order.

    Args:
        config: with a sweep.

    Returns:
        Their names.

    Raises:
        UsageError: a table of a method that is not compared, or nothing to tune.
    """
    assert config.sweep is not None
    asked = config.sweep.methods
    if asked is None:
        found = [m for m in config.methods if _usual(m, config)]
        if not found:
            raise UsageError(
                f"[sweep] has nothing to tune: of {', '.join(config.methods)} none has a usual range; "
                "give one, as [sweep.methods.replay] capacity = [50, 100, 200]"
            )
        return found
    for name in asked:
        if name not in config.methods:
            raise UsageError(
                f"[sweep.methods.{name}] is none of the methods compared: "
                f"{nearest(name, config.methods)}"
            )
    if not asked:
        raise UsageError("[sweep.methods] is empty: name a method, or leave the table out")
    return [m for m in config.methods if m in asked]


def axes_of(method: str, config: CompareConfig) -> list[Axis]:
    """Return what of a method is tuned.

    Args:
        method: one of :func:`tuned_methods`.
        config: with a sweep.

    Returns:
        The axes.

    Raises:
        UsageError: an unknown key or option, a range or value that makes no sense.
    """
    assert config.sweep is not None
    table = (config.sweep.methods or {}).get(method, {})
    if not table:
        table = _usual(method, config)
    if not table:
        raise UsageError(
            f"[sweep.methods.{method}] is empty and {method!r} has no usual range: name an option, "
            "as capacity = [50, 100, 200]"
        )
    parts = arms.parts_of(method, config.options)
    if len(parts) == 1:
        return [_checked(option, method, given, config) for option, given in table.items()]
    found = []
    for name, options in table.items():
        if name not in [part.name for part in parts]:
            raise UsageError(
                f"unknown key {name!r} in [sweep.methods.{method}]: "
                f"{nearest(name, [part.name for part in parts])}"
            )
        if not isinstance(options, Mapping):
            raise UsageError(
                f"sweep.methods.{method}.{name} = {options!r}: must be a table of options of {name!r}"
            )
        found += [_checked(f"{name}.{o}", method, given, config) for o, given in options.items()]
    return found


def read_axis(name: str, given: Any, where: str = "") -> Axis:
    """Read a list of values, or a table with ``values`` or with ``low``, ``high`` and ``log``.

    Without ``log`` a range of two decades or more is logarithmic.

    Args:
        name: of the axis.
        given: from the file.
        where: its key, for messages.

    Returns:
        The axis; whether only whole numbers will do is not known here.

    Raises:
        UsageError: it is neither, or makes no sense.

    Example:
        >>> read_axis("strength", {"low": 1.0, "high": 1e4}).log
        True
    """
    where = where or name
    if isinstance(given, list | tuple):
        given = {"values": list(given)}
    if not isinstance(given, Mapping):
        raise UsageError(
            f"{where} = {given!r}: give a list of values, or {{low = ..., high = ..., log = true}}"
        )
    read = parse(_Given, given, where)
    if read.values is not None:
        if (read.low, read.high, read.log) != (None, None, None):
            raise UsageError(f"{where} has values and a range: give one of them")
        if not read.values:
            raise UsageError(f"{where} has no values: give at least one")
        for value in read.values:
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{where} has the value {value}: give finite ones")
        if any(a == b for a, b in itertools.combinations(read.values, 2)):
            raise UsageError(f"{where} = {list(read.values)} has a value twice: give each once")
        return Axis(name, tuple(read.values))
    low, high = read.low, read.high
    if low is None or high is None:
        raise UsageError(f"{where} needs values, or both low and high")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"{where} goes from {low} to {high}: low must be below high")
    if not math.isfinite(high - low) or (low > 0 and not math.isfinite(high / low)):
        raise UsageError(f"{where} goes from {low} to {high}: that is too wide a range")
    if read.log and low <= 0:
        raise UsageError(f"{where}.low = {low}: must be above 0 where log = true")
    log = (low > 0 and high / low >= _WIDE) if read.log is None else read.log
    return Axis(name, None, low, high, log)


def options_with(
    method: str, options: Mapping[str, Mapping[str, Any]], values: Values
) -> dict[str, dict[str, Any]]:
    """Return options under which a method has certain values.

    Args:
        method: its name.
        options: the comparison's.
        values: names of axes to values.

    Returns:
        New options; other methods must not be run with them.
    """
    mine: dict[str, Any] = {}
    for name, value in values.items():
        part, dot, option = name.partition(".")
        if dot:
            mine.setdefault(part, {})[option] = value
        else:
            mine[name] = value
    return merge(options, {method: mine})


def grid(axes: Sequence[Axis], points: int) -> list[Values]:
    """Return all combinations, the first axis slowest.

    Args:
        axes: what is tuned.
        points: values of a range.

    Returns:
        The combinations.
    """
    names = [axis.name for axis in axes]
    several = itertools.product(*(axis.points(points) for axis in axes))
    return [dict(zip(names, values, strict=True)) for values in several]


def drawn(axes: Sequence[Axis], count: int, *who: str | int) -> list[Values]:
    """Draw values; the first ones do not depend on how many are drawn.

    Args:
        axes: what is tuned.
        count: how many.
        who: seeds the draws.

    Returns:
        The values.
    """
    found = []
    for number in range(count):
        rng = np.random.Generator(np.random.PCG64(seed_of(*who, "sweep", number)))
        found.append({axis.name: axis.at(float(rng.random())) for axis in axes})
    return found


def _usual(method: str, config: CompareConfig) -> dict[str, Any]:
    parts = arms.parts_of(method, config.options)
    ranges = {
        part.name: {k: {"low": a, "high": b, "log": True} for k, (a, b) in part.ranges.items()}
        for part in parts
        if part.ranges
    }
    return ranges.get(parts[0].name, {}) if len(parts) == 1 else ranges


def _checked(name: str, method: str, given: Any, config: CompareConfig) -> Axis:
    where = f"sweep.methods.{method}.{name}"
    axis = read_axis(name, given, where)
    option = name.rpartition(".")[2]
    if option == "method" or option in ("seed", "select"):
        raise UsageError(
            f"{where}: {option!r} is nothing to tune; name a strength or another option"
        )
    ends = list(axis.values) if axis.values is not None else [axis.low, axis.high]
    for value in ends:
        arms.settings_of(method, options_with(method, config.options, {name: value}))
    if axis.values is not None:
        return axis
    between = math.floor(axis.low) + 0.5
    try:
        arms.settings_of(method, options_with(method, config.options, {name: between}))
    except UsageError:
        return Axis(name, None, int(axis.low), int(axis.high), axis.log, whole=True)
    return axis
