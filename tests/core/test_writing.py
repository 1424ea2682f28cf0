from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from guywire.core import writing
from guywire.core.errors import CheckpointError


def test_the_old_file_stays_until_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with writing.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_in_the_block_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with writing.replacing(path) as file:
            file.write(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_what_informs_only_is_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    writing.write_json(tmp_path / "a.json", [1], durable=False)
    with pytest.raises(CheckpointError, match=r"a\.json: No space left on device"):
        writing.write_json(tmp_path / "a.json", [2])
    assert json.loads((tmp_path / "a.json").read_text()) == [1]


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        writing.write_text(tmp_path / "a.txt", "x")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file or directory"):
        writing.write_text(tmp_path / "no" / "a.txt", "x")


def test_json_has_no_nan(tmp_path: Path) -> None:
    writing.write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5, (float("inf"),)]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.5, [None]]}


def test_parquet_comes_back(tmp_path: Path) -> None:
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    writing.write_parquet(path, {"step": [1, 2], "name": ["a", "b"]})
    assert pyarrow.parquet.read_table(path).to_pydict() == {"step": [1, 2], "name": ["a", "b"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_new_files_obey_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        writing.write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644
