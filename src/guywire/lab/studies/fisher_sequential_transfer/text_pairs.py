"""Pairs of texts to learn a rewriting from: findings and impressions, or halves of verses.

``read_pairs`` takes a CSV or JSONL file with a column to read and a column to write, and, where the
same person stands behind several rows, a column that says so: ``split`` keeps a group whole.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from guywire.core.errors import DataError, UsageError
from guywire.lab.streams.lines import text_lines

__all__ = ["Pair", "Verse", "half_verses", "read_pairs", "read_verses", "split", "windows"]


@dataclass(frozen=True)
class Pair:
    """A text and what is to be made of it.

    Attributes:
        source: what is read.
        target: what is written.
        group: rows of one group (a patient, a chapter) never part.
    """

    source: str
    target: str
    group: str


def read_pairs(
    path: Path, source: str = "findings", target: str = "impression", group: str | None = None
) -> list[Pair]:
    """Read pairs from a CSV (with a header) or JSONL file, plain or gzipped.

    Rows in which either text is empty are left out, as usual with radiology reports.

    Args:
        path: ``*.csv``, ``*.jsonl``, or these with ``.gz``.
        source: the column that is read.
        target: the column that is written.
        group: the column that says whose row it is; without one, each row is a group.

    Returns:
        The pairs, in the order of the file.

    Raises:
        DataError: the file cannot be read, a line is damaged, or no pair is left.
        UsageError: a column is not there, or the file is of another kind.
    """
    pairs = []
    for number, row in _rows(path):
        for column in (source, target, *([group] if group else [])):
            if column not in row:
                raise UsageError(
                    f"{path} has no column {column!r} (line {number} has "
                    f"{', '.join(map(repr, row))}): name it with --source-column, "
                    "--target-column or --group-column"
                )
        texts = [" ".join(str(row[column] or "").split()) for column in (source, target)]
        if all(texts):
            pairs.append(Pair(texts[0], texts[1], str(row[group]) if group else f"row {number}"))
    if not pairs:
        raise DataError(f"{path} holds no pair with both {source!r} and {target!r}")
    return pairs


def split(
    pairs: Sequence[Pair], *, valid: float, test: float, generator: torch.Generator
) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Split pairs into training, validation and test, whole groups at a time.

    Args:
        pairs: all of them.
        valid: share of the groups for validation.
        test: share of the groups for the test.
        generator: of the shuffle.

    Returns:
        Training, validation and test pairs, each in the order of ``pairs``.

    Raises:
        DataError: there are too few groups for three parts.
    """
    groups = list(dict.fromkeys(pair.group for pair in pairs))
    n_valid, n_test = (max(1, round(share * len(groups))) for share in (valid, test))
    if len(groups) - n_valid - n_test < 1:
        raise DataError(
            f"{len(groups)} groups cannot be split into training, validation and test: "
            "more rows, or a finer group column, are needed"
        )
    order = torch.randperm(len(groups), generator=generator).tolist()
    part = {
        groups[i]: 2 if k < n_test else 1 if k < n_test + n_valid else 0
        for k, i in enumerate(order)
    }
    parts: tuple[list[Pair], list[Pair], list[Pair]] = ([], [], [])
    for pair in pairs:
        parts[part[pair.group]].append(pair)
    return parts


@dataclass(frozen=True)
class Verse:
    """A verse of the Bible: ``Psa``, ``1``, ``6``, and its text."""

    book: str
    chapter: int
    number: int
    text: str


def read_verses(path: Path) -> list[Verse]:
    """Read the King James Bible: lines ``Book chapter:verse text``, gzipped.

    Args:
        path: the file.

    Returns:
        The verses in order.

    Raises:
        DataError: the file cannot be read, or a line has another form.
    """
    verses = []
    form = re.compile(r"(\d?[A-Za-z]+)(\d+):(\d+) (.+)")
    for number, line in _lines(path):
        found = form.fullmatch(line)
        if found is None:
            raise DataError(f"line {number} of {path} is no verse: {line[:40]!r}")
        book, chapter, verse, text = found.groups()
        verses.append(Verse(book, int(chapter), int(verse), " ".join(text.split())))
    return verses


def windows(verses: Sequence[Verse], size: int) -> list[tuple[str, list[str]]]:
    """Cut every chapter into windows of consecutive verses; a shorter rest is left out.

    Args:
        verses: in order.
        size: verses a window.

    Returns:
        The chapter's name and the texts of each window.
    """
    chapters: dict[str, list[str]] = {}
    for verse in verses:
        chapters.setdefault(f"{verse.book} {verse.chapter}", []).append(verse.text)
    return [
        (name, texts[i : i + size])
        for name, texts in chapters.items()
        for i in range(0, len(texts) - size + 1, size)
    ]


def half_verses(verses: Sequence[Verse], *, words: int = 3) -> list[Pair]:
    """Split verses of poetry into their two halves: the second restates or opposes the first.

    The split is at the strongest stop (a colon, else a semicolon, else a comma), of several of one
    kind at the one nearest the middle; verses of which a half would be shorter than ``words`` are
    left out.

    Args:
        verses: of poetry books.
        words: the fewest words of a half.

    Returns:
        First half, second half, and the chapter as the group.
    """
    pairs = []
    for verse in verses:
        for stop in ":;,":
            cuts = [
                found.end()
                for found in re.finditer(re.escape(stop) + " ", verse.text)
                if len(verse.text[: found.end()].split()) >= words
                and len(verse.text[found.end() :].split()) >= words
            ]
            if cuts:
                cut = min(cuts, key=lambda at: abs(at - len(verse.text) / 2))
                first, second = verse.text[:cut].strip(), verse.text[cut:].strip()
                pairs.append(Pair(first, second, f"{verse.book} {verse.chapter}"))
                break
    return pairs


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text_lines(path, "utf-8-sig"), start=1):
        if line.strip():
            yield number, line.rstrip("\r\n")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind == ".jsonl":
        for number, line in _lines(path):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"line {number} of {path} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"line {number} of {path} is no JSON object")
            yield number, row
    elif kind == ".csv":
        csv.field_size_limit(10_000_000)
        reader = csv.DictReader(text_lines(path, "utf-8-sig"), strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"line {reader.line_num} of {path} has more or fewer cells than its header"
                    )
                yield reader.line_num, dict(row)
        except csv.Error as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    else:
        raise UsageError(f"{path} is neither .csv nor .jsonl (nor one of these with .gz)")
