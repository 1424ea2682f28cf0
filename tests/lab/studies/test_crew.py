"""One crew for several owners: nothing is lost, nobody waits in vain, order as promised."""

from __future__ import annotations

import os
import time
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from guywire.lab.studies.crew import Crew


def _note(folder: str, name: str, seconds: float = 0.0) -> str:
    time.sleep(seconds)
    with Path(folder, "order").open("a") as file:
        file.write(name + "\n")
    return name


def _wait_for(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.01)


def _fail() -> None:
    raise ValueError("no")


def _die() -> None:
    os._exit(3)


def test_the_owner_with_the_fewest_calls_to_go_is_served_first(tmp_path):
    with Crew(1) as crew:
        gate = crew.submit("gate", _wait_for, [(str(tmp_path / "open"),)])
        long = crew.submit("long", _note, [(str(tmp_path), f"long {i}") for i in range(3)])
        short = crew.submit("short", _note, [(str(tmp_path), f"short {i}") for i in range(2)])
        (tmp_path / "open").touch()
        assert [f.result(30) for f in (*gate, *long, *short)][1:] == [
            *("long 0", "long 1", "long 2"),
            *("short 0", "short 1"),
        ]
    order = (tmp_path / "order").read_text().split("\n")[:-1]
    assert order == ["short 0", "short 1", "long 0", "long 1", "long 2"]


def test_errors_stay_with_their_call_and_dropped_calls_never_start(tmp_path):
    with Crew(1) as crew:
        gate = crew.submit("gate", _wait_for, [(str(tmp_path / "open"),)])
        (bad,) = crew.submit("bad", _fail, [()])
        (gone,) = crew.submit("gone", _note, [(str(tmp_path), "gone")])
        (kept,) = crew.submit("kept", _note, [(str(tmp_path), "kept")])
        crew.drop("gone")
        (tmp_path / "open").touch()
        assert gate[0].result(30) is None
        with pytest.raises(ValueError, match="no"):
            bad.result(30)
        assert kept.result(30) == "kept"
        with pytest.raises(CancelledError):
            gone.result(30)
    assert (tmp_path / "order").read_text() == "kept\n"


def test_a_death_reaches_everyone_who_waits(tmp_path):
    with Crew(1) as crew:
        first = crew.submit("a", _die, [()])
        rest = crew.submit("b", _note, [(str(tmp_path), "b")] * 3)
        for future in (*first, *rest):
            with pytest.raises(BrokenProcessPool):
                future.result(30)
        (late,) = crew.submit("c", _note, [(str(tmp_path), "c")])
        assert late.cancelled()
    assert not (tmp_path / "order").exists()
