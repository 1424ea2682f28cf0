"""Studies and merges: killed, on a full disk, with what they had written cut short."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import guywire_faults as faults
import pytest
import torch
from safetensors.torch import save_file

from guywire.core.errors import CheckpointError
from guywire.lab.studies.runner import run_study
from guywire.methods.merging import merge_checkpoints

STUDY = """
from guywire.core.checkpoint import load, save
from guywire.lab.studies.study import Claim, Study
from guywire.lab.studies.verdict import Judgement
import torch

def prepare(work):
    save(work.leaves(f"start-{work.seed}.safetensors"), {"x": torch.ones(1) * work.number("x")})
    return []

def draw(work):
    x = load(work.folder / f"start-{work.seed}.safetensors")["x"]
    return [work.row("number", (float(x) + work.number(work.condition)) % 1000)]

def run(bench):
    bench.run(bench.units(prepare, ["start"]))
    bench.run(bench.units(draw, ["a", "b"]))

def judge(table):
    return Judgement("inconclusive", table.mean("a", "number").words())

STUDY = Study("draws", "Draws", "Nobody", "Draws.", {}, {}, [Claim("a", "s", "r", judge)], run, seeds=2)
"""
UNITS = 6


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    (tmp_path / "draws.py").write_text(STUDY)
    monkeypatch.chdir(tmp_path)

    def run(cache: str = "cache") -> dict[str, Any]:
        return run_study("draws.py", Path("out"), cache=Path(cache), workers=1)

    return run


def records() -> list[Path]:
    return sorted(Path("cache").rglob("*-seed*.json"))


def test_a_record_that_was_cut_is_computed_again(study: Callable[..., dict[str, Any]]) -> None:
    whole = study()["statistics"]
    assert len(records()) == UNITS
    draw = random.Random(faults.SEED)
    for path in records()[::2]:
        for share in (0.0, 0.99, draw.random()):
            data = path.read_bytes()  # its length varies: it says how long the unit took
            path.write_bytes(data[: int(share * (len(data) - 2))])
            again = study()
            assert again["computed_units"] == 1, (faults.SEED, path.name, share)
            assert again["statistics"] == whole, (faults.SEED, path.name, share)
    for rubbish in (b"[]", b"null", b'{"files": 3}', b"\xff"):
        records()[0].write_bytes(rubbish)
        assert study()["statistics"] == whole


def test_what_a_unit_left_is_named_when_it_was_cut(study: Callable[..., dict[str, Any]]) -> None:
    whole = study()["statistics"]
    (left,) = Path("cache").rglob("start-1.safetensors")
    left.write_bytes(left.read_bytes()[:50])
    for path in Path("cache").rglob("draw-seed1-*.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"start-1\.safetensors is damaged.*delete it"):
        study()
    left.unlink()
    assert study()["statistics"] == whole


def test_a_study_on_a_full_disk_goes_on_when_there_is_room(
    study: Callable[..., dict[str, Any]],
) -> None:
    whole = study("other")["statistics"]
    with faults.disk_full_from(10**9) as names:
        study("counted")
    for count in range(len(names)):
        cache = f"full-{count}"
        with (
            faults.disk_full_from(count),
            pytest.raises(CheckpointError, match="No space left on device"),
        ):
            study(cache)
        assert not list(Path(cache).rglob("*.tmp"))
        assert study(cache)["statistics"] == whole


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_study_killed_at_any_write_goes_on(study: Callable[..., dict[str, Any]]) -> None:
    whole = study("other")["statistics"]
    for count in range(1, 9):
        cache = f"killed-{count}"
        assert faults.killed_at_write(count, count % 2 == 0, lambda cache=cache: study(cache))
        for left in [*Path("out").rglob("*.tmp"), *Path(cache).rglob("*.tmp")]:
            os.utime(left, (time.time() - 7200,) * 2)  # younger ones may be somebody's at work
        assert study(cache)["statistics"] == whole
        assert not list(Path("out").rglob("*.tmp"))
        assert not list(Path(cache).rglob("*.tmp"))


def family(folder: Path) -> tuple[Path, list[Path]]:
    found = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.weight": torch.randn(64, 512, generator=g) for i in range(4)}
        path = folder / f"model-{seed}"
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text("{}")
        found.append(path)
    return found[0], found[1:]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def at_pwrite(count: int, happens: Callable[[], Any]) -> Callable[..., int]:
    plain, written = os.pwrite, 0

    def pwrite(*words: Any) -> int:
        nonlocal written
        written += 1
        if written >= count:
            happens()
        return plain(*words)

    return pwrite


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Callable[..., Any], dict[str, bytes]]:
    base, tuned = family(tmp_path)

    def merge(out: Path, **more: Any) -> Any:
        return merge_checkpoints(base, tuned, out, rate=0.5, threads=1, **more)

    merge(tmp_path / "whole")
    return merge, contents(tmp_path / "whole")


def check_goes_on(merge: Callable[..., Any], out: Path, whole: dict[str, bytes], what: str) -> None:
    assert not out.exists(), what
    merge(out, resume=True)
    assert contents(out) == whole, what
    assert not list(out.parent.glob(f".{out.name}*")), what


def test_a_merge_on_a_full_disk_goes_on_when_there_is_room(
    tmp_path: Path, merged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge, whole = merged
    for count in range(1, 6):
        out = tmp_path / f"full-{count}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", at_pwrite(count, full))
            with pytest.raises(CheckpointError, match=r"No space left on device.*free some space"):
                merge(out)
        check_goes_on(merge, out, whole, f"full from write {count}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_merge_killed_at_any_write_goes_on(tmp_path: Path, merged: Any) -> None:
    merge, whole = merged
    for count in range(1, 6):
        out = tmp_path / f"killed-{count}"
        child = os.fork()
        if child == 0:
            os.pwrite = at_pwrite(count, lambda: os.kill(os.getpid(), signal.SIGKILL))
            try:
                merge(out)
            finally:
                os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        check_goes_on(merge, out, whole, f"killed at write {count}")


def test_a_merge_goes_on_from_a_journal_or_a_file_that_was_cut(
    tmp_path: Path, merged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge, whole = merged
    draw = random.Random(faults.SEED)
    for number, name in enumerate(["journal"] * 5 + ["model.safetensors"] * 5):
        out = tmp_path / f"cut-{number}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", at_pwrite(4, full))
            with pytest.raises(CheckpointError):
                merge(out)
        path = tmp_path / f".{out.name}.guywire-merge" / name
        size = path.stat().st_size
        length = 0 if number % 5 == 0 else draw.randrange(size)
        with path.open("r+b") as file:
            file.truncate(length)
        check_goes_on(merge, out, whole, f"seed {faults.SEED}: {name} of {size} cut to {length}")


@pytest.mark.slow
def test_a_merge_on_a_file_system_that_is_too_small(tmp_path: Path, merged: Any) -> None:
    merge, whole = merged
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=300k", "guywire-test", str(disk)]
    if subprocess.run(words, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(CheckpointError, match=r"No space left on device.*free some space"):
            merge(disk / "out")
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        check_goes_on(merge, disk / "out", whole, "a larger disk")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
