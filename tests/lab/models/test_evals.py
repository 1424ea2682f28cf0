from __future__ import annotations

import gzip
from types import SimpleNamespace

import pytest

from guywire.core.errors import DataError, UsageError
from guywire.lab.models.evals import class_number, read_texts


def test_kinds_of_files_give_the_same_texts(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"one, two",x\nthree,y\n')
    (tmp_path / "a.tsv").write_text("text\tlabel\none, two\tx\nthree\ty\n")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one, two", "label": "x"}\n\n{"text": "three", "label": "y"}\n'
    )
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.jsonl.gz"):
        assert read_texts(tmp_path / name, "text", "label") == [("one, two", "x"), ("three", "y")]
        assert read_texts(tmp_path / name) == [("one, two", None), ("three", None)]
    (tmp_path / "b.txt").write_text("one, two\n\n  three \n")
    assert read_texts(tmp_path / "b.txt") == [("one, two", None), ("three", None)]


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="has no texts"):
        read_texts(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="no JSON object"):
        read_texts(tmp_path / "list.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path / "b.txt")
    with pytest.raises(UsageError, match=r"none of \.txt"):
        read_texts(tmp_path / "a.pdf")
    with pytest.raises(UsageError, match="has no labels"):
        read_texts(tmp_path / "b.txt", "text", "label")


def test_classes_go_by_name_then_by_number():
    config = SimpleNamespace(label2id={"cat": 0, "1": 2}, num_labels=3)
    assert [class_number(name, config) for name in ("cat", "1", "0", "2")] == [0, 2, 0, 2]
    for wrong in ("dog", "3", "-1"):
        with pytest.raises(UsageError, match=f"{wrong!r} is none of the model's 3 classes"):
            class_number(wrong, config)
