"""The harness: one tiny comparison, ways to disturb it, and what must be the same afterwards."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet

from guywire.cli import main
from guywire.lab.training.run import list_runs
from guywire.lab.training.trial import Trial

SEED = int(os.environ.get("GUYWIRE_FAULT_SEED", "0"))
KILLS = int(os.environ.get("GUYWIRE_KILLS", "20"))

METHODS, SEEDS, TASKS = ("ewc", "replay"), 2, 3
TRIALS = len(METHODS) * SEEDS
SETTINGS = f"""
methods = {list(METHODS)}
seeds = {SEEDS}
epochs = 3
batch_size = 16
[stream]
tasks = {TASKS}
max_per_class = 30
[evaluation]
dense = 4
[checkpoint]
steps = 5
"""


@dataclass
class Finished:
    """What an undisturbed comparison left.

    Attributes:
        folder: the run's.
        facts: see :func:`facts_of`.
        document: what ``--json`` printed.
    """

    folder: Path
    facts: dict[str, Any]
    document: Any


def call(*words: str) -> tuple[int, str, str]:
    """Call a command in this process; return its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return code, out.getvalue(), err.getvalue()


def settings_in(folder: Path) -> Path:
    path = folder / "settings.toml"
    path.write_text(SETTINGS)
    return path


def compare(out: Path, *words: str) -> tuple[int, str, str]:
    """Start, or go on with, the comparison in this process, with its settings named."""
    settings = settings_in(out.parent)
    return call("compare", str(settings), "--out", str(out), "--workers", "0", "--json", *words)


def resume(out: Path) -> tuple[int, str, str]:
    """Go on as the message says, without naming settings."""
    return call("compare", "--resume", "--out", str(out), "--workers", "0", "--json")


def undisturbed(folder: Path) -> Finished:
    code, out, err = compare(folder / "run")
    assert code == 0, err
    return Finished(folder / "run", facts_of(folder / "run"), timeless(json.loads(out)))


def timeless(value: Any) -> Any:
    """Drop what a clock measured, and where the folder lies."""
    if isinstance(value, dict):
        gone = ("seconds", "share", "run", "report", "out", "workers")
        return {key: timeless(item) for key, item in value.items() if key not in gone}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def facts_of(run: Path) -> dict[str, Any]:
    """Return all that must be the same bit for bit: names of files, bytes, rows, results."""
    facts: dict[str, Any] = {
        "files": sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()),
        "rows": [
            row
            for row in pyarrow.parquet.read_table(run / "results.parquet").to_pylist()
            if row["metric"] != "seconds"
        ],
        "status": json.loads((run / "run.json").read_text())["status"],
    }
    for path in sorted(run.glob("trials/*/result.json")):
        facts[path.parent.name] = timeless(json.loads(path.read_text()))
    same = ("trials/*/metrics.parquet", "samples/*.png", "stream.json")
    for path in sorted(p for pattern in same for p in run.glob(pattern)):
        facts[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = (run / "config.toml").read_text().splitlines()
    facts["settings"] = [line for line in lines if not line.startswith(("out", "workers"))]
    return facts


def check_equal(run: Path, answer: tuple[int, str, str], whole: Finished, what: str) -> None:
    """Fail unless a resumed run ended well and equals the undisturbed one; ``what`` is told."""
    code, out, err = answer
    assert code == 0, f"{what}: {err}"
    found = facts_of(run)
    wrong = [k for k in whole.facts.keys() | found.keys() if whole.facts.get(k) != found.get(k)]
    assert not wrong, f"{what}: {wrong[0]}: {found.get(wrong[0])} not {whole.facts.get(wrong[0])}"
    assert timeless(json.loads(out)) == whole.document, what
    assert list(run.rglob("*.tmp")) == [], what


def check_sentence(err: str, *names: str) -> None:
    """Fail unless the last line is one sentence of ours with these words, without a trace."""
    last = err.rstrip().splitlines()[-1]
    assert last.startswith("guywire: "), err
    assert "Traceback" not in err, err
    for name in names:
        assert name in last, (name, err)


def stopped_half_way(folder: Path, trial: str = "replay-seed0", step: int = 17) -> Path:
    with at_step(trial, step, lambda: (_ for _ in ()).throw(KeyboardInterrupt)):
        code, _, err = compare(folder / "run")
    assert code == 130, err
    return folder / "run"


@contextlib.contextmanager
def at_step(trial: str, step: int, happens: Callable[[], Any]) -> Iterator[None]:
    """Let something happen after a step of a trial that runs in this process."""
    plain = Trial._after_step

    def after(self: Trial) -> None:
        plain(self)
        if self.spec.id == trial and self.position.step == step:
            happens()

    Trial._after_step = after  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trial._after_step = plain  # type: ignore[method-assign]


@contextlib.contextmanager
def disk_full_from(count: int) -> Iterator[list[str]]:
    """Let the renaming of files fail from the given one on, as a full disk would; yields names."""
    names: list[str] = []
    plain = os.replace

    def replace(source: Any, target: Any, **more: Any) -> None:
        names.append(Path(target).name)
        if len(names) > count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(source, target, **more)

    os.replace = replace  # type: ignore[assignment]
    try:
        yield names
    finally:
        os.replace = plain


def killed_at_write(count: int, after: bool, job: Callable[[], Any]) -> bool:
    """Run a job in a fork that kills itself at its n-th write, before or after the rename."""
    child = os.fork()
    if child == 0:
        written = 0
        plain = os.replace

        def replace(source: Any, target: Any, **more: Any) -> None:
            nonlocal written
            written += 1
            if written == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            plain(source, target, **more)
            if written == count:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace  # type: ignore[assignment]
        try:
            job()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


# Real processes. Moments are drawn within stretches between events, so that they fall into every
# part of the work, whatever the machine is busy with.
EVENTS: dict[str, tuple[str, int]] = {
    "start": (".", 0),
    "lock": (".lock", 1),
    "settings": ("config.toml", 1),
    "samples": ("samples/*.png", TASKS),
    "trial": ("trials/*", 1),
    "state": ("trials/*/state.safetensors", 1),
    "result": ("trials/*/result.json", 1),
    "last": ("trials/*/result.json", TRIALS),
    "table": ("results.parquet", 1),
    "report": ("report.html", 1),
}


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    """Start the comparison in a process group of its own, with two workers."""
    settings = settings_in(out.parent)
    line = [sys.executable, "-m", "guywire.cli", "compare", str(settings), "--out", str(out)]
    return subprocess.Popen(
        [*line, "--workers", "2", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(process: subprocess.Popen[str], out: Path, event: str) -> bool:
    """Wait for an event; False if the process ended first."""
    pattern, count = EVENTS[event]
    end = time.monotonic() + 200
    while count and len(list(out.glob(pattern))) < count:
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, f"{event} never came"
        time.sleep(0.004)
    return True


def timeline(folder: Path) -> dict[str, float]:
    """Run once undisturbed, and return how many seconds it was from each event to the next."""
    process = start(folder / "run")
    moments = []
    for event in EVENTS:
        wait_for(process, folder / "run", event)
        moments.append(time.monotonic())
    _, err = process.communicate()
    assert process.returncode == 0, err
    moments.append(time.monotonic())
    return {event: moments[i + 1] - moments[i] for i, event in enumerate(EVENTS)}


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "spawn_main" in " ".join(_words(child))
        ]
    return []


def _words(child: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return child.cmdline()
    return []


def disturb(
    process: subprocess.Popen[str],
    out: Path,
    event: str,
    delay: float,
    whom: str,
    how: signal.Signals,
    draw: random.Random,
) -> tuple[bool, str]:
    """Send a signal at a moment to ``group``, ``parent`` or ``worker``; return whether it came in
    time, and what the command printed. No process is left afterwards."""
    there = wait_for(process, out, event)
    time.sleep(delay)
    family = workers_of(process)
    end = time.monotonic() + 100
    while whom == "worker" and not family and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.004)
        family = workers_of(process)
    there = there and process.poll() is None
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if whom == "group":
            os.killpg(process.pid, how)
        elif whom == "parent":
            process.send_signal(how)
        elif family:
            draw.choice(family).send_signal(how)
    _, err = process.communicate(timeout=200)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == [], "workers outlived their parent"
    return there, err


def status_of(out: Path) -> str | None:
    """Return what ``guywire runs`` says of a run; ``None`` if it does not list it."""
    found = [r for r in list_runs(out.parent) if Path(r["path"]) == out]
    return found[0]["status"] if found else None
