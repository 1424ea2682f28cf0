from __future__ import annotations

import csv
import gzip
import json

import pytest
import torch

from guywire.core.errors import DataError, UsageError
from guywire.lab.studies.fisher_sequential_transfer.text_pairs import (
    Pair,
    Verse,
    half_verses,
    read_pairs,
    read_verses,
    split,
    windows,
)

ROWS = [
    {"findings": "Heart normal.\nLungs clear.", "impression": "Normal chest.", "patient": "7"},
    {"findings": 'Says "stable", as before', "impression": "Stable", "patient": "7"},
    {"findings": "", "impression": "Nothing was found", "patient": "8"},
    {"findings": "Effusion on the left", "impression": "Effusion", "patient": "9"},
]


def as_csv(path, rows=ROWS):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_jsonl(path, rows=ROWS):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "csv.gz", "jsonl.gz"])
def test_the_same_pairs_from_every_kind_of_file(tmp_path, kind):
    write = as_csv if kind.startswith("csv") else as_jsonl
    path = write(
        tmp_path / kind.replace("csv", "x.csv").replace("jsonl", "x.jsonl").removesuffix(".gz")
    )
    if kind.endswith(".gz"):
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    pairs = read_pairs(path, group="patient")
    assert pairs == [
        Pair("Heart normal. Lungs clear.", "Normal chest.", "7"),
        Pair('Says "stable", as before', "Stable", "7"),
        Pair("Effusion on the left", "Effusion", "9"),  # the row without findings is left out
    ]
    assert len({pair.group for pair in read_pairs(path)}) == 3


def test_columns_by_name(tmp_path):
    rows = [{"in": "a b", "out": "a"}]
    assert read_pairs(as_csv(tmp_path / "x.csv", rows), "in", "out")[0].target == "a"
    with pytest.raises(UsageError, match=r"no column 'findings'.*--source-column"):
        read_pairs(tmp_path / "x.csv")


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"neither \.csv nor \.jsonl"):
        read_pairs(tmp_path / "x.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(tmp_path / "missing.csv")
    (tmp_path / "bad.jsonl").write_text('{"findings": "a", "impression": "b"}\n{"findings"\n')
    with pytest.raises(DataError, match=r"line 2 of .* is no JSON"):
        read_pairs(tmp_path / "bad.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="no JSON object"):
        read_pairs(tmp_path / "list.jsonl")
    (tmp_path / "short.csv").write_text("findings,impression\na\n")
    with pytest.raises(DataError, match=r"line 2 of .* more or fewer cells"):
        read_pairs(tmp_path / "short.csv")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"findings,impression\na,b\n" * 99)[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(tmp_path / "cut.csv.gz")
    (tmp_path / "empty.csv").write_text("findings,impression\n,\n")
    with pytest.raises(DataError, match="no pair"):
        read_pairs(tmp_path / "empty.csv")


def test_a_group_never_parts():
    pairs = [Pair(f"s{i}", f"t{i}", f"patient {i % 17}") for i in range(100)]
    parts = split(pairs, valid=0.1, test=0.2, generator=torch.Generator().manual_seed(1))
    groups = [{pair.group for pair in part} for part in parts]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert sorted(map(len, groups)) == [2, 3, 12]
    assert sorted(p.source for part in parts for p in part) == sorted(p.source for p in pairs)
    again = split(pairs, valid=0.1, test=0.2, generator=torch.Generator().manual_seed(1))
    assert parts == again


def test_too_few_groups_are_refused():
    pairs = [Pair("a", "b", "one"), Pair("c", "d", "two")]
    with pytest.raises(DataError, match="2 groups"):
        split(pairs, valid=0.1, test=0.1, generator=torch.Generator())


def test_halves_at_the_strongest_stop_nearest_the_middle():
    def half(text):
        found = half_verses([Verse("Psa", 1, 6, text)])
        return (found[0].source, found[0].target, found[0].group) if found else None

    assert half("For the LORD knoweth the way of the righteous: but the way shall perish.") == (
        "For the LORD knoweth the way of the righteous:",
        "but the way shall perish.",
        "Psa 1",
    )
    # the colon wins over a comma nearer the middle; of two semicolons the middle one
    assert half("One two three: four five, six seven eight nine ten")[0] == "One two three:"
    assert half("a b c; d e f g h i; jj kk ll mm nn")[0] == "a b c; d e f g h i;"
    assert half("a b c; d e f; g h i")[0] == "a b c;"
    assert half("Selah: the end of it all") is None  # a half of one word
    assert half("No stop in this one at all") is None


def test_windows_stay_within_chapters():
    verses = [Verse("Ge", c, n, f"{c}:{n}") for c in (1, 2) for n in range(1, 8)]
    cut = windows(verses, 3)
    assert cut == [
        ("Ge 1", ["1:1", "1:2", "1:3"]),
        ("Ge 1", ["1:4", "1:5", "1:6"]),
        ("Ge 2", ["2:1", "2:2", "2:3"]),
        ("Ge 2", ["2:4", "2:5", "2:6"]),
    ]


def test_reading_verses(tmp_path):
    path = tmp_path / "kjv.txt.gz"
    path.write_bytes(gzip.compress(b"Ge1:1 In the beginning\n1Chr12:13 Jeremiah  the tenth\n"))
    assert read_verses(path) == [
        Verse("Ge", 1, 1, "In the beginning"),
        Verse("1Chr", 12, 13, "Jeremiah the tenth"),
    ]
    path.write_bytes(gzip.compress(b"Ge1:1 In the beginning\nChapter 2\n"))
    with pytest.raises(DataError, match=r"line 2 of .* is no verse: 'Chapter 2'"):
        read_verses(path)
