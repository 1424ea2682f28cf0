"""Five tasks of naming what a short text is: three on verses, two on emoji.

Each text begins with words that say which task it is, as a prompt does, so one head can serve all.
Verses are split by chapter and emoji whole, the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from guywire.core.errors import DataError
from guywire.lab import streams
from guywire.lab.studies.fisher_sequential_transfer.text_pairs import Verse, read_verses

__all__ = ["PARTS", "TASKS", "Item", "files", "make_items"]

PARTS = ("train", "valid", "test")

_GROUPS = {
    "law": ("Ge", "Exo", "Lev", "Num", "Deu"),
    "history": ("Josh", "Jdgs", "1Sm", "2Sm", "1Ki", "2Ki", "1Chr", "2Chr", "Ezra", "Neh"),
    "poetry": ("Job", "Psa", "Prv", "Eccl", "SSol"),
    "major prophets": ("Isa", "Jer", "Lam", "Eze", "Dan"),
    "minor prophets": ("Hos", "Joel", "Amos", "Mic", "Nah", "Hab", "Zep", "Zec", "Mal"),
    "gospels": ("Mat", "Mark", "Luke", "John"),
    "letters of Paul": ("Rom", "1Cor", "2Cor", "Gal", "Eph", "Phi", "Col", "1Tim", "2Tim"),
    "the end": ("Rev",),
}
_STORIES = ("Ge", "Exo", "Josh", "1Sm", "1Ki", "2Chr", "Dan", "Mat", "John", "Acts")
_POEMS = ("Job", "Psa", "Prv", "Eccl", "SSol")

TASKS = ("part", "emoji", "story", "family", "poem")
"""Verse to part of the Bible (8), emoji to group (9), verse to book of stories (10), emoji to one of
the ten largest subgroups, verse to book of poetry (5)."""

_PROMPTS = {
    "part": "part of the bible:",
    "emoji": "kind of emoji:",
    "story": "book of stories:",
    "family": "family of emoji:",
    "poem": "book of poems:",
}


@dataclass(frozen=True)
class Item:
    """A text with its answer.

    Attributes:
        task: one of :data:`TASKS`.
        part: one of :data:`PARTS`.
        text: with its prompt.
        answer: in words.
        source: the chapter or emoji that it is from; never in two parts.
    """

    task: str
    part: str
    text: str
    answer: str
    source: str


def files() -> list[Path]:
    """Return the data files."""
    folder = streams.data_folder()
    return [folder / "kjv.txt.gz", folder / "renditions.parquet"]


def make_items(per_task: int, valid: int, test: int) -> list[Item]:
    """Make the texts of all tasks; classes are as even as their sources allow.

    Args:
        per_task: training texts a task, at most.
        valid: validation texts a task.
        test: test texts a task.

    Returns:
        The items.

    Raises:
        DataError: a file is missing or damaged, or a task gets too few texts.
    """
    generator = torch.Generator().manual_seed(0)
    verses = [v for v in read_verses(files()[0]) if 5 <= len(v.text.split()) <= 40]
    emoji = _emoji(files()[1])
    largest = sorted({e["subgroup"] for e in emoji if e["group"] != "Flags"}, key=_sizes(emoji))
    book_of = {book: group for group, books in _GROUPS.items() for book in books}
    answers = {
        "part": [(v.text, book_of[v.book], _chapter(v)) for v in verses if v.book in book_of],
        "emoji": [(e["caption"], e["group"], e["codepoint"]) for e in emoji],
        "story": [(v.text, v.book, _chapter(v)) for v in verses if v.book in _STORIES],
        "family": [
            (e["caption"], e["subgroup"], e["codepoint"])
            for e in emoji
            if e["subgroup"] in largest[-10:]
        ],
        "poem": [(v.text, v.book, _chapter(v)) for v in verses if v.book in _POEMS],
    }
    homes = _homes({s for rows in answers.values() for _, _, s in rows}, generator)
    sizes = dict(zip(PARTS, (per_task, valid, test), strict=True))
    items = []
    for task in TASKS:
        for part in PARTS:
            rows = [row for row in answers[task] if homes[row[2]] == part]
            chosen = _evenly(rows, sizes[part], generator)
            if len(chosen) < 0.9 * sizes[part]:
                raise DataError(f"the task {task!r} has only {len(chosen)} texts for {part}")
            items += [
                Item(task, part, f"{_PROMPTS[task]} {text}", f"{task}: {answer}", source)
                for text, answer, source in chosen
            ]
    return items


def _homes(sources: set[str], generator: torch.Generator) -> dict[str, str]:
    """Give each chapter and each emoji to one part: 60, 15 and 25 per cent."""
    names = sorted(sources)
    order = torch.randperm(len(names), generator=generator).tolist()
    cut = (int(0.6 * len(names)), int(0.75 * len(names)))
    return {
        names[i]: "train" if n < cut[0] else "valid" if n < cut[1] else "test"
        for n, i in enumerate(order)
    }


def _evenly(
    rows: Sequence[tuple[str, str, str]], count: int, generator: torch.Generator
) -> list[tuple[str, str, str]]:
    """Shuffle, then take classes in turn."""
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    rank: dict[str, int] = {}
    keyed = []
    for n, row in enumerate(shuffled):
        rank[row[1]] = rank.get(row[1], 0) + 1
        keyed.append((rank[row[1]], n, row))
    return [row for _, _, row in sorted(keyed)[:count]]


def _emoji(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"{path} is missing: set GUYWIRE_DATA to the folder that holds it")
    columns = ["codepoint", "caption", "group", "subgroup"]
    rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    return list({row["codepoint"]: row for row in rows}.values())


def _sizes(emoji: Sequence[dict[str, Any]]) -> Any:
    counts: dict[str, int] = {}
    for e in emoji:
        counts[e["subgroup"]] = counts.get(e["subgroup"], 0) + 1
    return lambda name: (counts[name], name)


def _chapter(verse: Verse) -> str:
    return f"{verse.book} {verse.chapter}"
