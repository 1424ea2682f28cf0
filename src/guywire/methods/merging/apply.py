"""Restore a merged model from its base and its compressed delta, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from guywire.core.errors import CheckpointError
from guywire.core.headers import DTYPES
from guywire.methods.merging._companions import RECIPE, read_beside, write_companions
from guywire.methods.merging._compressed import DELTA, Delta, crc_of, positions
from guywire.methods.merging._output import Target, layout_rows, request_of
from guywire.methods.merging._threads import Threads
from guywire.methods.merging.files import Checkpoint
from guywire.methods.merging.masks import BLOCK
from guywire.methods.merging.merge import MergeResult, Progress

__all__ = ["apply_delta"]


def apply_delta(
    delta: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    resume: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Make the model that the merge with ``delta_only=False`` would have made.

    Args:
        delta: the folder that ``merge_checkpoints(..., delta_only=True)`` made.
        base: the same base; every piece of it is checked.
        out: the folder to make.
        force: replace what an earlier merge made at ``out``.
        resume: go on with an interrupted one.
        threads: at most; one a core if ``None``.
        progress: told how far it is.

    Returns:
        What was done.

    Raises:
        DataError: there is no delta.
        CheckpointError: the delta is damaged, or the base is another one.
        UsageError: ``out`` is there already, or is one of the sources.
    """
    found = Delta(delta)
    folder, about = found.file.parent, found.about
    target = Target(Path(out), [Path(base), folder], force=force, resume=resume)
    say = progress or (lambda *_: None)
    with Checkpoint(base) as pretrained, Checkpoint(found.file) as values, Threads(threads) as pool:
        restore = _Restore(pretrained, values, about)
        restore.check()
        stats = [
            (str(e), e.stat().st_size, e.stat().st_mtime_ns)
            for e in (found.file, *pretrained.files)
        ]
        target.begin(request_of(delta=about, stats=stats), resume=resume)
        with target.working():
            size, reused = _write(target, restore, pool, say)
            write_companions(target.work, _beside(folder), about["recipe"])
            target.finish()
    rows = [row for rows in about["files"].values() for row in rows]
    counts = {
        "pruned": sum(row["pruned"] and bool(row["models"]) for row in rows),
        "merged": sum(not row["pruned"] and bool(row["models"]) for row in rows),
        "kept": sum(row["base"] is None for row in rows),
        "unchanged": sum(row["base"] is not None and not row["models"] for row in rows),
    }
    return MergeResult(Path(out), about["recipe"], counts, size, reused, ())


class _Restore:
    def __init__(self, base: Checkpoint, values: Checkpoint, about: dict[str, Any]) -> None:
        self.base, self.values, self.about = base, values, about

    def check(self) -> None:
        for rows in self.about["files"].values():
            for row in rows:
                if row["base"] is None:
                    continue
                entry = self.base.tensors.get(row["base"])
                # Nor may a forged delta ask for more than the base and its own values hold.
                due = row["common"] if row["pruned"] else 0
                due = _numel(row) if row["same"] else due
                if entry is None or entry.numel < due:
                    raise self.other(row["base"])

    def other(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.base.path} is not the base that this delta was made from: {name!r} differs; it was "
            f"made from {self.about['recipe']['base']!r}"
        )

    def piece(self, row: dict[str, Any], number: int, at: int) -> Tensor:
        start, stop = number * BLOCK, min((number + 1) * BLOCK, _numel(row))
        count, crc = row["pieces"][number]
        out = None
        if crc is not None:
            entry = self.base.tensors[row["base"]]
            end = min(stop, entry.numel)
            if end <= start or crc_of(out := self.base.read(row["base"], start, end)) != crc:
                raise self.other(row["base"])
        if row["same"]:
            return self._due(row, out, stop - start)
        new = self.values.read(row["name"], at, at + count)
        where = positions(row, self.about["rate"], self.about["seed"], start, stop)
        if where is None:
            return self._due(row, new, stop - start)
        out = self._due(row, out, stop - start).to(DTYPES[row["dtype"]])
        if len(where) != count:
            raise CheckpointError(
                f"{self.values.path}: {row['name']!r} has {count} values for {len(where)} places: it "
                "was made by another version"
            )
        return out.index_copy_(0, where, new)

    def _due(self, row: dict[str, Any], values: Tensor | None, count: int) -> Tensor:
        if values is None or len(values) != count:
            raise CheckpointError(
                f"{self.values.path} is damaged: it does not hold all of {row['name']!r}; copy it again"
            )
        return values


def _write(target: Target, restore: _Restore, pool: Threads, say: Progress) -> tuple[int, int]:
    work: list[tuple[str, dict[str, Any], int, int, int]] = []
    size = total = 0
    for file, rows in restore.about["files"].items():
        header, offsets, length = layout_rows(
            [(row["name"], row["dtype"], tuple(row["shape"])) for row in rows],
            restore.about["metadata"],
        )
        target.open(file, header, length)
        size += length
        for row in rows:
            at, width = 0, DTYPES[row["dtype"]].itemsize
            total += _numel(row)
            for number, (count, _) in enumerate(row["pieces"]):
                place = offsets[row["name"]] + number * BLOCK * width
                work.append((file, row, number, at, place))
                at += count

    def one(job: tuple[str, dict[str, Any], int, int, int]) -> tuple[int, bool]:
        file, row, number, at, place = job
        length = min(BLOCK, _numel(row) - number * BLOCK)
        if target.has(file, place, length * DTYPES[row["dtype"]].itemsize):
            return length, True
        target.write(file, place, restore.piece(row, number, at))
        return length, False

    done = reused = 0
    for count, known in pool.map(one, work):
        done += count
        reused += count * known
        say("writing", done, total)
    return size, reused


def _numel(row: dict[str, Any]) -> int:
    size = 1
    for side in row["shape"]:
        size *= side
    return size


def _beside(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): read_beside(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (DELTA, RECIPE)
    }
