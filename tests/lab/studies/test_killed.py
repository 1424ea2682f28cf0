"""A study that is killed leaves no processes behind, and goes on from the units that had finished."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from guywire.lab.studies.runner import run_study

SLOW = """
import time
from guywire.lab.studies.study import Claim, Study
from guywire.lab.studies.verdict import Judgement

def wait(work):
    time.sleep(0.4)
    return [work.row("number", work.number("draw") % 1000)]

def run(bench):
    bench.run(bench.units(wait, ["a", "b"]))

def judge(table):
    return Judgement("inconclusive", table.mean("a", "number").words())

STUDY = Study("slow", "Slow", "Nobody", "Waits.", {}, {}, [Claim("a", "s", "r", judge)], run, seeds=8)
"""
RUN = """
import sys
from pathlib import Path
from guywire.lab.studies.runner import run_study
if __name__ == "__main__":
    run_study("slow.py", Path("out"), cache=Path("cache"), workers=2)
"""


@pytest.mark.multiprocess
def test_killed_and_gone_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "run.py").write_text(RUN)
    process = subprocess.Popen([sys.executable, "run.py"], cwd=tmp_path)
    started = time.monotonic()
    while len(list((tmp_path / "cache").rglob("wait-*.json"))) < 3:
        assert process.poll() is None, "the study ended too early"
        assert time.monotonic() - started < 60
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(family) >= 2
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    done = len(list((tmp_path / "cache").rglob("wait-*.json")))

    result = run_study("slow.py", tmp_path / "out", cache=tmp_path / "cache", workers=1)
    assert result["computed_units"] == 16 - done
    whole = run_study("slow.py", tmp_path / "out", cache=tmp_path / "other", workers=1)
    assert whole["computed_units"] == 16
    assert result["statistics"] == whole["statistics"]
