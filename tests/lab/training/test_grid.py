from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from guywire.lab.training import grid
from guywire.lab.training.config import TrialSpec
from guywire.lab.training.grid import Outcome, default_workers, run_grid

SMALL: dict[str, Any] = {
    "stream": {"tasks": 2, "classes": 4, "max_per_class": 20},
    "epochs": 1,
    "batch_size": 16,
}


def spec(**changes: Any) -> TrialSpec:
    return TrialSpec.model_validate({**SMALL, **changes})


def hashes(outcomes: list[Outcome]) -> dict[str, str]:
    return {o.spec.id: o.result["weights_sha256"] for o in outcomes if o.result is not None}


def test_a_trial_that_fails_is_written_down_and_the_others_go_on(tmp_path: Path) -> None:
    specs = [
        spec(),
        spec(method="ewc", optimizer="sgd", options={"ewc": {"strength": 1e30}}),
        spec(method="l2"),
    ]
    seen: list[str] = []
    outcomes = run_grid(specs, tmp_path, workers=0, done=lambda o: seen.append(o.spec.id))
    assert seen == ["finetune-seed0", "ewc-seed0", "l2-seed0"]
    assert [o.error is None for o in outcomes] == [True, False, True]
    written = json.loads((tmp_path / "ewc-seed0" / "error.json").read_text())
    assert written["error"] == outcomes[1].error
    assert "step" in written["error"]
    assert not (tmp_path / "ewc-seed0" / "result.json").exists()


def test_a_bug_is_a_failure_with_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(grid, "_stream", broken)
    (outcome,) = run_grid([spec()], tmp_path, workers=0)
    assert outcome.error == "ZeroDivisionError: oh"
    assert (
        "test_grid"
        in json.loads((tmp_path / outcome.spec.id / "error.json").read_text())["traceback"]
    )


def test_an_old_error_vanishes_when_the_trial_succeeds(tmp_path: Path) -> None:
    folder = tmp_path / "finetune-seed0"
    folder.mkdir()
    (folder / "error.json").write_text("{}")
    run_grid([spec()], tmp_path, workers=0, resume=True)
    assert not (folder / "error.json").exists()


@pytest.mark.multiprocess
def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    specs = [spec(method=m, seed=s) for s in (0, 1) for m in ("l2", "replay")]
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1

    spread = run_grid(specs, tmp_path / "two", workers=2, tick=tick)
    here = run_grid(specs, tmp_path / "none", workers=0)
    assert hashes(spread) == hashes(here)
    assert len(hashes(here)) == 4
    assert ticks > 0


@pytest.mark.multiprocess
def test_a_worker_that_dies_costs_its_trial_only(tmp_path: Path) -> None:
    slow = spec(method="ewc", epochs=100_000)
    specs = [slow, spec(), spec(method="l2")]

    def kill() -> None:
        import multiprocessing

        progress = tmp_path / slow.id / "progress.json"
        if progress.exists() and not killed:
            victim = multiprocessing.active_children()[0]
            killed.append(victim.pid)
            os.kill(victim.pid or 0, signal.SIGKILL)

    killed: list[int | None] = []
    first, *others = run_grid(specs, tmp_path, workers=1, tick=kill)
    assert killed
    assert first.error is not None
    assert "died by signal 9" in first.error
    assert "--resume" in first.error
    assert all(o.result is not None for o in others)


@pytest.mark.multiprocess
def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from guywire.lab.training.config import TrialSpec\n"
        "from guywire.lab.training.grid import run_grid\n"
        "if __name__ == '__main__':\n"
        "    spec = TrialSpec.model_validate_json(sys.argv[1])\n"
        "    run_grid([spec], Path(sys.argv[2]), workers=1)\n"
    )
    path = tmp_path / "main.py"
    path.write_text(script)
    slow = spec(epochs=100_000, checkpoint={"seconds": 0.2})
    parent = subprocess.Popen(
        [sys.executable, str(path), slow.model_dump_json(), str(tmp_path / "trials")]
    )
    state = tmp_path / "trials" / slow.id / "state.safetensors"
    _wait(state.exists)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    time.sleep(1.0)
    written = state.stat().st_mtime_ns
    time.sleep(1.0)
    assert state.stat().st_mtime_ns == written, "an orphan is still writing"


def _wait(ready: Any) -> None:
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_workers_suit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert default_workers(21, 1) == 8
    assert default_workers(3, 1) == 3
    assert default_workers(21, 4) == 2
    assert default_workers(21, 16) == 1
