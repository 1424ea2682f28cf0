"""A comparison that is killed at any moment goes on to the same results, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import guywire_faults as faults
import pytest


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return faults.timeline(tmp_path_factory.mktemp("timeline"))


PARTS = ("group", "parent", "worker")
WITH_WORKERS = ("trial", "state", "result")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("whom", PARTS)
def test_killed_at_random_moments(
    tmp_path: Path, whole: faults.Finished, gaps: dict[str, float], whom: str
) -> None:
    draw = random.Random(f"{faults.SEED} {whom}")
    mine = len(range(PARTS.index(whom), faults.KILLS, len(PARTS)))
    events = list(WITH_WORKERS if whom == "worker" else faults.EVENTS)
    order = [
        events[i * len(events) // mine if mine < len(events) else i % len(events)]
        for i in range(mine)
    ]
    kills = 0
    for number, event in enumerate(order):
        out = tmp_path / str(number) / "run"
        out.parent.mkdir()
        delay = draw.uniform(0, gaps[event])
        what = f"GUYWIRE_FAULT_SEED={faults.SEED}, {whom} {number}, {delay:.3f} s after {event}"
        process = faults.start(out)
        there, err = faults.disturb(process, out, event, delay, whom, signal.SIGKILL, draw)
        kills += there
        if whom == "worker":
            assert process.returncode in (0, 1), what
            assert faults.status_of(out) == ("done" if process.returncode == 0 else "failed"), what
            if process.returncode == 1:
                faults.check_sentence(err, "died by signal 9", "--resume")
        elif there:
            assert process.returncode == -signal.SIGKILL, what
            if (out / "run.json").exists():
                finished = json.loads((out / "run.json").read_text())["status"] == "done"
                assert faults.status_of(out) == ("done" if finished else "killed"), what
                assert not finished or (out / "results.parquet").is_file(), what
        begun = (out / "run.json").exists()
        answer = faults.resume(out) if begun else faults.compare(out, "--resume")
        faults.check_equal(out, answer, whole, what)
    assert kills >= mine // 2, f"only {kills} of {mine} kills came in time"


def check_killed_at_write(tmp_path: Path, whole: faults.Finished, count: int, after: bool) -> bool:
    out = tmp_path / f"{count}{after}" / "run"
    out.parent.mkdir()
    killed = faults.killed_at_write(count, after, lambda: faults.compare(out))
    if killed:
        begun = (out / "run.json").exists()
        answer = faults.resume(out) if begun else faults.compare(out, "--resume")
        faults.check_equal(out, answer, whole, f"killed at write {count}, after: {after}")
    return killed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_before_the_settings_are_written(tmp_path: Path, whole: faults.Finished) -> None:
    assert check_killed_at_write(tmp_path, whole, 1, True)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_write(tmp_path: Path, whole: faults.Finished, after: bool) -> None:
    with faults.disk_full_from(10**9) as names:
        (tmp_path / "counted").mkdir()
        assert faults.compare(tmp_path / "counted" / "run")[0] == 0
    draw = random.Random(faults.SEED)
    everyone = range(1, len(names) + 1)
    first = [n for n in everyone if names[n - 1] != "state.safetensors"]
    states = draw.sample([n for n in everyone if n not in first], 6)
    for count in sorted([*first, *states]):
        check_killed_at_write(tmp_path, whole, count, after)


def test_an_empty_start_is_no_run_to_resume_without_settings(tmp_path: Path) -> None:
    (tmp_path / "run" / "trials").mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    code, _, err = faults.resume(tmp_path / "run")
    assert code == 2
    faults.check_sentence(err, "there is no run to resume in", "name the settings again")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "trials"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(900)
@pytest.mark.parametrize("whom", ["group", "parent"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_ended_by_a_scheduler(
    tmp_path: Path,
    whole: faults.Finished,
    gaps: dict[str, float],
    whom: str,
    how: signal.Signals,
) -> None:
    draw = random.Random(f"{faults.SEED} {whom} {how}")
    for event in ("settings", "state", "result"):
        delay = draw.uniform(0, gaps[event] / 2)
        for number in range(6):
            out = tmp_path / f"{event}{number}" / "run"
            out.parent.mkdir()
            what = f"GUYWIRE_FAULT_SEED={faults.SEED}, {how} {whom}, {delay:.3f} s after {event}"
            process = faults.start(out)
            there, err = faults.disturb(process, out, event, delay, whom, how, draw)
            if there and faults.status_of(out) != "done":
                break
            # The gaps were measured on a busier machine: the run had ended before.
            assert process.returncode in (0, 128 + how, -how), (what, err)
            faults.check_equal(out, faults.resume(out), whole, what)
            delay /= 2
        assert there, what
        assert process.returncode == 128 + how, (what, err)
        faults.check_sentence(err, "interrupted", f"guywire compare --resume --out {out}")
        assert faults.status_of(out) == "interrupted", what
        faults.check_equal(out, faults.resume(out), whole, what)
