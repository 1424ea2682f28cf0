"""Choose classes, hold data out, and cut what is left into tasks."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from guywire.core.errors import UsageError
from guywire.lab.streams.config import StreamConfig
from guywire.lab.streams.tables import TEST, TRAIN, VALID, Table

__all__ = ["Plan", "PlannedTask", "even_parts", "plan"]

# Test data are the same for every seed of a stream.
_TEST_SEED = 20260701


@dataclass(frozen=True, eq=False)
class PlannedTask:
    """Row numbers of one task.

    Attributes:
        name: for people.
        classes: stream-wide class numbers.
        rows: of ``TRAIN``, ``VALID`` and ``TEST``, by that number.
    """

    name: str
    classes: tuple[int, ...]
    rows: tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which rows go where.

    Attributes:
        tasks: in the order of training.
        numbers: stream-wide class number of each of the table's classes; -1 where left out.
        class_names: by stream-wide number.
        notes: what was left out.
    """

    tasks: tuple[PlannedTask, ...]
    numbers: np.ndarray
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def even_parts(total: int, parts: int) -> list[int]:
    """Cut a number into parts that differ by at most one, the larger ones first.

    Args:
        total: what to cut.
        parts: how many.

    Returns:
        The sizes.

    Example:
        >>> even_parts(10, 3)
        [4, 3, 3]
    """
    small, over = divmod(total, parts)
    return [small + (i < over) for i in range(parts)]


def plan(table: Table, config: StreamConfig) -> Plan:
    """Decide which rows of a table make up which task.

    Args:
        table: the data.
        config: the settings.

    Returns:
        The plan.

    Raises:
        UsageError: there are too few classes, domains or samples for what is asked.
    """
    notes: list[str] = []
    kept = _classes(table, config, notes)
    rows = np.flatnonzero(np.isin(table.labels, kept))
    rows = _capped(table, config, rows)
    part, notes_of_split = _parts(table, config, rows)
    notes += notes_of_split
    kept = _learnable(table, config, kept, rows, part, notes)
    keep = np.isin(table.labels[rows], kept)
    rows, part = rows[keep], part[keep]

    order = np.array(kept, dtype=np.int64)
    if config.class_order == "seed":
        order = _rng(config.seed, "class order").permutation(order)
    numbers = np.full(len(table.class_names), -1, dtype=np.int64)
    numbers[order] = np.arange(len(order))
    names = tuple(table.class_names[c] for c in order)
    if config.scenario == "domain":
        tasks = _by_domain(table, config, rows, part, len(order), notes)
    else:
        tasks = _by_class(table, config, rows, part, numbers, names)
    return Plan(tuple(tasks), numbers, names, tuple(notes))


def _rng(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def _classes(table: Table, config: StreamConfig, notes: list[str]) -> list[int]:
    """Return the classes to keep, in the data set's order."""
    counts = np.bincount(table.labels, minlength=len(table.class_names))
    enough = counts >= config.min_per_class
    if table.subjects is not None:
        pairs = np.unique(np.stack([table.labels, table.subjects]), axis=1)
        several = np.bincount(pairs[0], minlength=len(counts)) >= 2
        if (enough & ~several).any():
            notes.append(
                f"{(enough & ~several).sum()} classes with a single subject were left out: "
                "a subject is held out whole, so one must be left to train on"
            )
        enough &= several
    few = int((counts < config.min_per_class).sum())
    if few:
        notes.append(f"{few} classes with fewer than {config.min_per_class} samples were left out")
    kept = np.flatnonzero(enough)
    if config.classes is not None and config.classes > len(kept):
        raise UsageError(
            f"{config.classes} classes are asked for, but {table.name!r} has {len(kept)} with at "
            f"least {config.min_per_class} samples: ask for fewer, or lower the minimum"
        )
    if config.classes is not None and config.classes < len(kept):
        largest = kept[np.argsort(-counts[kept], kind="stable")][: config.classes]
        notes.append(f"the {config.classes} largest of {len(kept)} classes were kept")
        kept = np.sort(largest)
    return _some(table, config, kept.tolist())


def _some(table: Table, config: StreamConfig, kept: list[int]) -> list[int]:
    if len(kept) < 2:
        found = len(table.class_names)
        raise UsageError(
            f"{table.name!r} has {len(kept)} class{'' if len(kept) == 1 else 'es'} to learn of "
            f"{found} found, and a stream needs 2 or more: name another label column, or lower "
            f"min_per_class ({config.min_per_class})"
        )
    return kept


def _capped(table: Table, config: StreamConfig, rows: np.ndarray) -> np.ndarray:
    """Keep at most ``max_per_class`` rows of each class, in the proportions of the parts."""
    cap = config.max_per_class
    if cap is None:
        return rows
    rng = _rng(_TEST_SEED, "max per class")
    kept = []
    for label in np.unique(table.labels[rows]):
        mine = rows[table.labels[rows] == label]
        if table.part is not None and (table.part[mine] == TEST).any():
            testing = mine[table.part[mine] == TEST]
            training = mine[table.part[mine] != TEST]
            share = max(1, min(cap - 1, round(cap * config.test_fraction)))
            kept += [rng.permutation(testing)[:share], rng.permutation(training)[: cap - share]]
        elif table.subjects is None:
            kept.append(rng.permutation(mine)[:cap])
        else:
            kept.append(_whole_subjects(table.subjects, mine, cap, rng))
    return np.sort(np.concatenate(kept))


def _whole_subjects(
    subjects: np.ndarray, rows: np.ndarray, cap: int, rng: np.random.Generator
) -> np.ndarray:
    """Take whole subjects while they fit, and two at the least, or nothing could be held out."""
    names, counts = np.unique(subjects[rows], return_counts=True)
    order = rng.permutation(len(names))
    fits = np.cumsum(counts[order]) <= cap
    fits[:2] = True
    return rows[np.isin(subjects[rows], names[order[fits]])]


def _parts(table: Table, config: StreamConfig, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Say of each row whether it trains, validates or tests."""
    units, notes = rows, []
    given = None if table.part is None else table.part[rows]
    if table.subjects is not None:
        units = table.subjects[rows]
        if given is not None and np.intersect1d(units[given == TEST], units[given != TEST]).size:
            given = None
            notes.append(
                "the data set's own split puts rows of one subject on both sides, so a new split "
                "by whole subjects was drawn"
            )
    labels = table.labels[rows]
    part = np.full(len(rows), TRAIN, dtype=np.int8) if given is None else given.copy()
    if not (part == TEST).any():
        chosen = _held_out(labels, units, config.test_fraction, _rng(_TEST_SEED, "test"))
        part[chosen] = TEST
    if config.valid_fraction > 0 and not (part == VALID).any():
        rest = np.flatnonzero(part == TRAIN)
        rng = _rng(config.seed, "validation")
        chosen = _held_out(labels[rest], units[rest], config.valid_fraction, rng)
        part[rest[chosen]] = VALID
    return part, notes


def _held_out(
    labels: np.ndarray, units: np.ndarray, fraction: float, rng: np.random.Generator
) -> np.ndarray:
    """Choose whole units, class by class: the fraction of each, one at least, never the last."""
    names, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    stratum = labels[first]  # a subject seen under several classes counts under its first
    chosen = np.zeros(len(names), dtype=bool)
    for label in np.unique(stratum):
        mine = rng.permutation(np.flatnonzero(stratum == label))
        count = min(max(1, round(fraction * len(mine))), len(mine) - 1)
        chosen[mine[:count]] = True
    return chosen[inverse]


def _learnable(
    table: Table,
    config: StreamConfig,
    kept: list[int],
    rows: np.ndarray,
    part: np.ndarray,
    notes: list[str],
) -> list[int]:
    """Drop classes that ended up without anything to train on or to test."""
    labels = table.labels[rows]
    groups = [np.ones(len(rows), dtype=bool)]
    if config.scenario == "domain":
        if table.domains is None:
            raise UsageError(
                f"{table.name!r} has no domains: name a column with --domain-column, or use the "
                "scenario 'class' or 'task'"
            )
        groups = [table.domains[rows] == d for d in range(len(table.domain_names))]
        groups = [g for g in groups if g.any()][: config.tasks]
    good = [
        c
        for c in kept
        if all(
            ((labels == c) & g & (part == TRAIN)).any()
            and ((labels == c) & g & (part == TEST)).any()
            for g in groups
        )
    ]
    if len(good) < len(kept):
        where = "in every domain" if config.scenario == "domain" else ""
        notes.append(
            f"{len(kept) - len(good)} classes were left out that have no training or no test "
            f"sample {where}".rstrip()
        )
    return _some(table, config, good)


def _by_class(
    table: Table,
    config: StreamConfig,
    rows: np.ndarray,
    part: np.ndarray,
    numbers: np.ndarray,
    names: tuple[str, ...],
) -> list[PlannedTask]:
    count = config.tasks or max(1, min(5, len(names) // 2))
    if count > len(names):
        raise UsageError(
            f"{count} tasks need {count} classes or more, but {table.name!r} has {len(names)}: "
            "ask for fewer tasks"
        )
    labels = numbers[table.labels[rows]]
    tasks, start = [], 0
    for size in even_parts(len(names), count):
        classes = tuple(range(start, start + size))
        mine = (labels >= start) & (labels < start + size)
        name = ", ".join(names[c] for c in classes[:4]) + (
            f" and {size - 4} more" if size > 4 else ""
        )
        tasks.append(PlannedTask(name, classes, _three(rows, part, mine)))
        start += size
    return tasks


def _by_domain(
    table: Table,
    config: StreamConfig,
    rows: np.ndarray,
    part: np.ndarray,
    classes: int,
    notes: list[str],
) -> list[PlannedTask]:
    assert table.domains is not None
    domains = table.domains[rows]
    present = [d for d in range(len(table.domain_names)) if (domains == d).any()]
    count = config.tasks or len(present)
    if count > len(present):
        raise UsageError(
            f"{count} tasks need {count} domains, but {table.name!r} has {len(present)} "
            f"({', '.join(table.domain_names[d] for d in present[:8])}): ask for fewer tasks"
        )
    if count < len(present):
        notes.append(f"the first {count} of {len(present)} domains were kept")
    return [
        PlannedTask(table.domain_names[d], tuple(range(classes)), _three(rows, part, domains == d))
        for d in present[:count]
    ]


def _three(
    rows: np.ndarray, part: np.ndarray, mine: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    train, valid, test = (rows[mine & (part == which)] for which in (TRAIN, VALID, TEST))
    return train, valid, test
