"""Many trials on a Ray cluster: the same results as from worker processes of this machine.

Every trial is one Ray task. Its files come here while it runs, so when its process or its node dies
it goes on elsewhere from the last state that arrived; nodes need not share a file system.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import guywire
from guywire.core import writing
from guywire.core.errors import CheckpointError, GuywireError, UsageError
from guywire.lab.training import ray_cluster
from guywire.lab.training.config import CompareConfig, TrialSpec
from guywire.lab.training.grid import Outcome
from guywire.lab.training.ray_node import LOG, STATE, environment, line, read_files, step_of
from guywire.lab.training.ray_settings import RayConfig, capacity, parse_on, shortfall
from guywire.lab.training.record import finished

__all__ = ["joined", "run_grid"]

_joined: ContextVar[ray_cluster.Cluster | None] = ContextVar("_joined", default=None)
_log = logging.getLogger("guywire.lab")
_LOOK = 5.0  # seconds between two looks at the nodes
_GRACE = 30.0  # seconds without any node that can run a trial, once trials have run
# Not sent to a node: it would be no news, or make the trial look finished.
_STAY = ("result.json", "error.json", "progress.json")


@contextlib.contextmanager
def joined(config: CompareConfig) -> Iterator[ray_cluster.Cluster | None]:
    """Join the cluster that a comparison names, and see that it can run a trial.

    Within such a block, another one finds the same cluster.

    Args:
        config: the settings.

    Yields:
        The cluster; ``None`` for ``on = "local"``.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: there is no such cluster, or none of its nodes can ever run a trial.
    """
    place = parse_on(config.on)
    if place.kind == "local":
        yield None
        return
    if (already := _joined.get()) is not None:
        yield already
        return
    if config.workers == 0:
        raise UsageError(
            "--workers 0 runs trials in this process, --on ray in others: leave one of them out"
        )
    request = config.ray.request(config.threads)
    cpus = request.get("CPU", 0) * (config.workers or 1)
    with ray_cluster.joined(place, cpus) as cluster:
        end = time.monotonic() + config.ray.wait
        while (why := shortfall(request, cluster.nodes())) is not None:
            if time.monotonic() >= end:
                raise UsageError(why)
            time.sleep(1.0)
        token = _joined.set(cluster)
        try:
            yield cluster
        finally:
            _joined.reset(token)


def run_grid(
    specs: Sequence[TrialSpec],
    folder: Path,
    *,
    cluster: Any,
    settings: RayConfig | None = None,
    workers: int | None = None,
    resume: bool = False,
    done: Callable[[Outcome], None] | None = None,
    tick: Callable[[], None] | None = None,
) -> list[Outcome]:
    """Run trials on a cluster, as :func:`guywire.lab.training.grid.run_grid` does here.

    Args:
        specs: the trials.
        folder: trials get ``folder / spec.id``; what their nodes wrote arrives there, with the
            lines of their logs in ``log.txt``.
        cluster: a :class:`guywire.lab.training.ray_cluster.Cluster`, or what acts like one.
        settings: resources and retries.
        workers: trials at once, at most; ``None``: as many as the cluster holds.
        resume: go on from states that are there.
        done: called with each trial's outcome when it ends.
        tick: called a few times a second while waiting.

    Returns:
        Outcomes, in the order of the specs. A failed trial leaves ``error.json`` in its folder.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the tasks were cancelled; the folder can be resumed.
        GuywireError: the cluster is gone; the folder can be resumed.
    """
    run = _Run(folder, cluster, settings or RayConfig(), workers, done, tick or (lambda: None))
    try:
        run.all(specs, resume)
    except ConnectionError as error:
        raise GuywireError(
            f"the connection to the Ray cluster is lost ({error}): go on with --resume"
        ) from error
    finally:
        run.stop()
    return [run.outcomes[spec.id] for spec in specs]


@dataclass
class _Job:
    """A trial on its way.

    Attributes:
        spec: the trial.
        resume: go on from a state that is there.
        attempt: its number; mail of earlier ones is thrown away.
        deaths: since the state last moved on.
        step: of the newest state that arrived, -1 if none did.
        died_at: ``step`` at the last death.
    """

    spec: TrialSpec
    resume: bool
    attempt: int = 1
    deaths: int = 0
    step: int = -1
    died_at: int = -1


class _Run:
    def __init__(
        self,
        folder: Path,
        cluster: Any,
        settings: RayConfig,
        workers: int | None,
        done: Callable[[Outcome], None] | None,
        tick: Callable[[], None],
    ) -> None:
        self.folder, self.cluster, self.settings = folder, cluster, settings
        self.workers, self.done, self.tick = workers, done, tick
        self.waiting: deque[_Job] = deque()
        self.running: dict[Any, _Job] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.limit = 1
        self.request: dict[str, float] = {}
        self._looked_at = self._able_at = float("-inf")

    def all(self, specs: Sequence[TrialSpec], resume: bool) -> None:
        for spec in specs:
            known = finished(self.folder / spec.id) if resume else None
            if known is not None:
                self._end(spec, {"result": known})
            else:
                self.waiting.append(_Job(spec, resume))
        self._able_at = time.monotonic()
        while self.waiting or self.running:
            self._look_at_nodes()
            while self.waiting and len(self.running) < self.limit:
                self._start(self.waiting.popleft())
            ready = self.cluster.wait(list(self.running), 0.3)
            self._sort_mail()  # before the results: what was sent before a death comes first
            for handle in ready:
                self._collect(self.running.pop(handle), handle)
            self.tick()

    def stop(self) -> None:
        """Cancel what still runs, and keep what arrived."""
        if self.running:
            with contextlib.suppress(Exception):
                self.cluster.cancel(list(self.running))
            with contextlib.suppress(Exception):
                self._sort_mail()
            self.running.clear()

    def _start(self, job: _Job) -> None:
        home = self.folder / job.spec.id
        home.mkdir(parents=True, exist_ok=True)
        (home / "error.json").unlink(missing_ok=True)
        files = {n: d for n, d in read_files(home).items() if n not in _STAY} if job.resume else {}
        found = step_of(files.get(STATE, b""))
        job.step = -1 if found is None else found
        message = {
            "trial": job.spec.id,
            "spec": job.spec.model_dump(mode="json"),
            "attempt": job.attempt,
            "resume": job.resume,
            "home": str(home),
            "cwd": os.getcwd(),
            "environment": environment(),
            "version": guywire.__version__,
        }
        self.running[self.cluster.submit(message, files, self.request)] = job

    def _sort_mail(self) -> None:
        jobs = {job.spec.id: job for job in self.running.values()}
        for trial, attempt, name, data in self.cluster.mail():
            job = jobs.get(trial)
            # A node that was taken for dead may still be sending.
            if job is not None and job.attempt == attempt:
                self._keep(job, name, data)

    def _keep(self, job: _Job, name: str, data: bytes) -> None:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise CheckpointError(f"{job.spec.id}: a node sent a file with the name {name!r}")
        writing.write_bytes(self.folder / job.spec.id / name, data, durable=name == STATE)
        if name == STATE:
            found = step_of(data)
            job.step = job.step if found is None else max(job.step, found)

    def _collect(self, job: _Job, handle: Any) -> None:
        spec = job.spec
        try:
            answer, files = self.cluster.result(handle)
        except ray_cluster.Refused as refused:
            self._fail(job, f"{spec.id}: {refused}", "Refused")
            return
        except ray_cluster.Died as died:
            self._again(job, str(died))
            return
        last = files.pop("result.json", None)
        for name, data in files.items():
            self._keep(job, name, data)
        if last is not None:  # where it lies, the others must be
            writing.write_bytes(self.folder / spec.id / "result.json", last)
        self._end(spec, answer)

    def _again(self, job: _Job, why: str) -> None:
        """Let a trial go on elsewhere, unless it dies again and again at the same place."""
        job.deaths = 1 if job.step > job.died_at else job.deaths + 1
        job.died_at = job.step
        if job.deaths > self.settings.retries:
            times = f"{job.deaths} times" if job.deaths > 1 else "once"
            self._fail(
                job,
                f"{job.spec.id}: {why}; that happened {times} without getting further: if memory "
                "ran out, ask for more (memory in [ray]) or allow fewer --workers; then go on "
                "with --resume",
                "Died",
            )
            return
        job.attempt += 1
        job.resume = True
        where = "from the start" if job.step < 0 else f"from step {job.step}"
        text = f"{why}: attempt {job.attempt} goes on {where}"
        self._note(job, text)
        _log.warning("%s: %s", job.spec.id, text)
        self.waiting.appendleft(job)

    def _fail(self, job: _Job, why: str, kind: str) -> None:
        home = self.folder / job.spec.id
        self._note(job, f"failed: {why}")
        with contextlib.suppress(GuywireError):
            writing.write_json(home / "error.json", {"error": why, "traceback": None, "kind": kind})
        self._end(job.spec, {"error": why})

    def _note(self, job: _Job, text: str) -> None:
        path = self.folder / job.spec.id / LOG
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        writing.write_text(path, f"{old}{line(text)}\n", durable=False)

    def _end(self, spec: TrialSpec, answer: dict[str, Any]) -> None:
        outcome = Outcome(spec, answer.get("result"), answer.get("error"))
        self.outcomes[spec.id] = outcome
        if self.done is not None:
            self.done(outcome)

    def _look_at_nodes(self) -> None:
        """See how many trials fit; give up when no node that could run one has been for long."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK:
            return
        self._looked_at = now
        jobs = [*self.waiting, *self.running.values()]
        self.request = self.settings.request(max(job.spec.threads for job in jobs))
        nodes = self.cluster.nodes()
        why = shortfall(self.request, nodes)
        if why is None:
            self._able_at = now
        elif now - self._able_at > max(_GRACE, self.settings.wait):
            raise GuywireError(f"{len(jobs)} trials are left, but {why}; then go on with --resume")
        # Some wait at the cluster, so that no node idles; not all: their states lie in memory there.
        room = max(2, 2 * capacity(self.request, nodes))
        self.limit = room if self.workers is None else self.workers
