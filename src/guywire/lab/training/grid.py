"""Many trials over worker processes: started by spawn, replaced when they die, gone with us.

Messages are JSON over pipes. A trial that fails is written down and the others go on. A worker
whose parent vanishes (SIGKILL) ends itself, so that a resumed run never meets an old one's workers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from guywire.core import writing
from guywire.core.errors import GuywireError
from guywire.lab import models, streams
from guywire.lab.streams import Stream, StreamConfig
from guywire.lab.training.config import TrialSpec

__all__ = ["Outcome", "default_workers", "run_grid"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Outcome(NamedTuple):
    """What became of a trial.

    Attributes:
        spec: the trial.
        result: the content of ``result.json``, ``None`` if it failed.
        error: why it failed, in a sentence.
    """

    spec: TrialSpec
    result: dict[str, Any] | None
    error: str | None


def default_workers(trials: int, threads: int) -> int:
    """Return how many processes suit this machine.

    Args:
        trials: how many there are to run.
        threads: of each trial.

    Returns:
        One for every ``threads`` cores that we may use, at most one a trial, at least one.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min(trials, cores // threads))


def run_grid(
    specs: Sequence[TrialSpec],
    folder: Path,
    *,
    workers: int,
    resume: bool = False,
    done: Callable[[Outcome], None] | None = None,
    tick: Callable[[], None] | None = None,
) -> list[Outcome]:
    """Run trials, each in its own folder.

    Args:
        specs: the trials.
        folder: trials get ``folder / spec.id``.
        workers: processes; 0 runs them here, one after another.
        resume: go on from states that are there.
        done: called with each trial's outcome when it ends.
        tick: called a few times a second while waiting.

    Returns:
        Outcomes, in the order of the specs. A failed trial leaves ``error.json`` in its folder.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the workers are gone; what they did can be resumed.
    """
    outcomes: dict[str, Outcome] = {}
    folder.mkdir(parents=True, exist_ok=True)

    def finish(spec: TrialSpec, answer: dict[str, Any]) -> None:
        outcome = Outcome(spec, answer.get("result"), answer.get("error"))
        outcomes[spec.id] = outcome
        if done is not None:
            done(outcome)

    if workers == 0:
        for spec in specs:
            finish(spec, attempt(spec, folder / spec.id, resume))
    else:
        _spread(specs, folder, workers, resume, finish, tick or (lambda: None))
    return [outcomes[spec.id] for spec in specs]


def attempt(spec: TrialSpec, directory: Path, resume: bool) -> dict[str, Any]:
    """Run one trial and turn whatever it raises into a sentence.

    Args:
        spec: the trial.
        directory: its folder.
        resume: go on from a state that is there.

    Returns:
        ``{"result": ...}`` or ``{"error": ...}``.
    """
    from guywire.lab.training.trial import run_trial

    try:
        _make(directory)
        (directory / "error.json").unlink(missing_ok=True)
        return {
            "result": run_trial(
                spec, directory, resume, _stream(spec.stream.model_dump_json(), spec.model)
            )
        }
    except GuywireError as error:
        why, trace, kind = str(error), None, type(error).__name__
    except Exception as error:
        kind = type(error).__name__
        why, trace = f"{kind}: {error}", traceback.format_exc()
    with contextlib.suppress(GuywireError):  # the disk may be what failed
        writing.write_json(
            directory / "error.json", {"error": why, "traceback": trace, "kind": kind}
        )
    return {"error": why}


@functools.lru_cache(maxsize=1)
def _stream(config: str, model: str) -> Stream:
    """Load data; those of the last trial stay in memory for the next."""
    return models.prepare(model, streams.load(StreamConfig.model_validate_json(config)))


def _make(directory: Path) -> None:
    try:
        # Not its parents: where the run's folder was deleted, it shall not come back as a torso.
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise writing.cannot_write(directory, error) from error


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, context: Any) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.spec: TrialSpec | None = None

    def give(self, spec: TrialSpec, directory: Path, resume: bool) -> None:
        self.spec = spec
        message = {"spec": spec.model_dump(mode="json"), "dir": str(directory), "resume": resume}
        with contextlib.suppress(OSError):  # it died: its sentinel will tell
            self.pipe.send_bytes(json.dumps(message).encode())

    def stop(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


def _spread(
    specs: Sequence[TrialSpec],
    folder: Path,
    workers: int,
    resume: bool,
    finish: Callable[[TrialSpec, dict[str, Any]], None],
    tick: Callable[[], None],
) -> None:
    waiting = deque(specs)
    crew: list[_Worker] = []
    context = multiprocessing.get_context("spawn")
    with _threads_in_environment(specs[0].threads if specs else 1):
        try:
            for _ in range(min(workers, len(specs))):
                crew.append(_Worker(context))
            while True:
                for worker in crew:
                    if worker.spec is None and waiting:
                        spec = waiting.popleft()
                        worker.give(spec, folder / spec.id, resume)
                busy = [worker for worker in crew if worker.spec is not None]
                if not busy:
                    return
                handles = [h for w in busy for h in (w.pipe, w.process.sentinel)]
                ready = connection.wait(handles, timeout=0.3)
                for worker in busy:
                    if worker.pipe in ready or worker.process.sentinel in ready:
                        _collect(worker, crew, context, finish, bool(waiting))
                tick()
        finally:
            for worker in crew:
                worker.stop()


def _collect(
    worker: _Worker,
    crew: list[_Worker],
    context: Any,
    finish: Callable[[TrialSpec, dict[str, Any]], None],
    more: bool,
) -> None:
    spec = worker.spec
    assert spec is not None
    try:
        answer = json.loads(worker.pipe.recv_bytes())
        worker.spec = None
    except (EOFError, OSError):
        worker.process.join()
        code = worker.process.exitcode or 0
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        answer = {
            "error": f"{spec.id}: its process died {how}: if memory ran out, use fewer --workers; "
            "then go on with --resume"
        }
        crew.remove(worker)
        worker.stop()
        if more:
            crew.append(_Worker(context))
    finish(spec, answer)


def _serve(pipe: connection.Connection) -> None:
    """Be a worker: take trials until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who stops us
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    while True:
        try:
            message = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        spec = TrialSpec.model_validate(message["spec"])
        answer = attempt(spec, Path(message["dir"]), message["resume"])
        with contextlib.suppress(OSError):
            pipe.send_bytes(json.dumps(answer).encode())


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


@contextlib.contextmanager
def _threads_in_environment(threads: int) -> Iterator[None]:
    """Let child processes start with so many threads: torch's pools are sized at import."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
