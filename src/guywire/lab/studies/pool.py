"""Run units over spawned processes with one thread each, and remember each as it finishes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from guywire.core.errors import GuywireError
from guywire.lab.studies import module_of
from guywire.lab.studies.cache import Cache
from guywire.lab.studies.crew import Crew
from guywire.lab.studies.study import Unit, Work

__all__ = ["Pool", "Progress", "StudyError", "crew_of"]

Progress = Callable[[int, int, str], None]
"""Called with units done, units known so far, and what is going on."""


class StudyError(GuywireError):
    """A unit of a study failed."""


def crew_of(workers: int) -> Crew:
    """Return processes that can work on units, with one thread each.

    Args:
        workers: how many.

    Returns:
        A crew, to be used as a context manager.
    """
    return Crew(workers, _prepare)


class Pool:
    """Workers for the units of one study; a context manager.

    Args:
        name: the study's slug or file, by which a worker finds it.
        slug: the study's slug.
        settings: as resolved.
        cache: of finished units.
        workers: how many processes; 1 works in this one.
        crew: processes shared with other studies, in place of ``workers`` of its own.
        progress: told of every unit.
    """

    def __init__(
        self,
        name: str,
        slug: str,
        settings: Mapping[str, Any],
        cache: Cache,
        *,
        workers: int,
        crew: Crew | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.computed = 0
        self._task = (name, slug, dict(settings), cache.files)
        self._cache = cache
        self._workers = workers
        self._progress = progress
        self._known = 0
        self._crew = crew
        self._own = crew is None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._crew is None:
            return
        if self._own:
            self._crew.stop(kill=kind is not None)
            self._crew = None
        else:
            self._crew.drop(self)

    def execute(self, units: Sequence[Unit]) -> list[dict[str, Any]]:
        """Run units, less those finished before.

        Args:
            units: in the order in which the answers are wanted.

        Returns:
            One record a unit: ``rows, files, seconds, ...``.

        Raises:
            StudyError: a unit failed; what had finished stays finished.
        """
        keys = [_key(unit) for unit in units]
        todo: dict[str, Unit] = {}
        for key, unit in zip(keys, units, strict=True):
            if key in self.records or key in todo:
                continue
            self._known += 1
            record = self._cache.get(unit)
            if record is None:
                todo[key] = unit
            else:
                self.records[key] = record
        if todo:
            self._tell("")
            ordered = sorted(todo.items(), key=lambda item: -item[1].cost)
            if self._crew is None and self._workers == 1:
                self._here(ordered)
            else:
                self._there(ordered)
        return [self.records[key] for key in keys]

    def _here(self, ordered: Sequence[tuple[str, Unit]]) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for key, unit in ordered:
                try:
                    record = _work(*self._task, unit)
                except GuywireError:
                    raise
                except Exception as error:
                    raise _failed(unit, error) from error
                self._finish(key, unit, record)
        finally:
            torch.set_num_threads(threads)

    def _there(self, ordered: Sequence[tuple[str, Unit]]) -> None:
        if self._crew is None:
            self._crew = crew_of(self._workers)
        calls = [(*self._task, unit) for _, unit in ordered]
        pending: dict[Future[dict[str, Any]], tuple[str, Unit]] = dict(
            zip(self._crew.submit(self, _work, calls), ordered, strict=True)
        )
        failure: BaseException | None = None
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                key, unit = pending.pop(future)
                try:
                    self._finish(key, unit, future.result())
                except GuywireError as error:
                    failure = failure or error
                except CancelledError as error:
                    failure = failure or StudyError(
                        f"stopped before {_words(unit)}: what had finished is kept"
                    ).with_traceback(error.__traceback__)
                except BrokenProcessPool as error:
                    failure = failure or StudyError(
                        f"a worker died in {_words(unit)}: perhaps memory ran out; run again with "
                        "fewer --workers, what had finished is kept"
                    ).with_traceback(error.__traceback__)
                except Exception as error:
                    wrapped = _failed(unit, error)
                    wrapped.__cause__ = error
                    failure = failure or wrapped
            if failure is not None:
                raise failure

    def _finish(self, key: str, unit: Unit, record: dict[str, Any]) -> None:
        self._cache.put(unit, record)
        self.records[key] = record
        self.computed += 1
        self._tell(_words(unit))

    def _tell(self, text: str) -> None:
        if self._progress is not None:
            self._progress(len(self.records), self._known, text)


def _key(unit: Unit) -> str:
    return repr((unit.function, unit.condition, unit.seed, sorted(unit.arguments.items())))


def _words(unit: Unit) -> str:
    extra = ", ".join(f"{k}={v}" for k, v in unit.arguments.items() if isinstance(v, int | float))
    return f"{unit.condition}, seed {unit.seed}" + (f", {extra}" if extra else "")


def _failed(unit: Unit, error: BaseException) -> StudyError:
    return StudyError(
        f"{unit.function} of {_words(unit)} failed with {type(error).__name__}: {error}"
    )


def _prepare() -> None:
    """Make a spawned process a worker: one thread, and gone when its parent is."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    torch.set_num_threads(1)
    logging.getLogger("guywire").setLevel(logging.ERROR)  # remarks would tear the progress bar
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _work(
    name: str, slug: str, settings: Mapping[str, Any], folder: Path, unit: Unit
) -> dict[str, Any]:
    function = getattr(module_of(name), unit.function)
    work = Work(slug, settings, unit.condition, unit.seed, folder)
    started, cpu = time.time(), time.process_time()
    # Dropout and Hugging Face's initialisation draw from the global generator and take no other:
    # here it is seeded, and put back.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(work.number(unit.function))
        rows = function(work, **unit.arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "function": unit.function,
        "condition": unit.condition,
        "seed": unit.seed,
        "arguments": dict(unit.arguments),
        "rows": rows,
        "files": work.files,
        "started": started,
        "seconds": time.time() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_memory_mb": peak / (1024.0**2 if sys.platform == "darwin" else 1024.0),
    }
