"""MLflow: a run for the comparison, and a nested one for each trial."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guywire.core.errors import need
from guywire.lab.tracking.events import Began, Ended, Event, Scalar, TrialEnded

__all__ = ["MLflow"]

# What the server takes in one request.
_METRICS, _PARAMS = 1000, 100
_LONGEST = 500  # of a parameter's value, in older servers


class MLflow:
    """Log to the server that ``MLFLOW_TRACKING_URI`` names, else to ``<run>/mlflow/mlflow.db``.

    The experiment is ``guywire``, or what ``MLFLOW_EXPERIMENT_NAME`` says. Runs are found again by
    tags (``guywire.run``, ``guywire.trial``), so nothing is there twice. The run's report is an
    artifact of the comparison's run.

    Raises:
        MissingExtraError: MLflow is not installed.
    """

    def __init__(self) -> None:
        with _quiet():
            self._tracking: Any = need("mlflow.tracking", extra="mlflow")
            self._entities: Any = need("mlflow.entities", extra="mlflow")
        self._client: Any = None
        self._experiment = ""
        self._parent = ""

    def log(self, event: Event) -> None:
        """Log an event.

        Args:
            event: what happened.
        """
        with _quiet():
            if isinstance(event, Began):
                self._begin(event)
            elif isinstance(event, TrialEnded):
                self._trial(event)
            else:
                self._end(event)

    def _begin(self, event: Began) -> None:
        uri, place = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            home = (event.folder / "mlflow").resolve()
            home.mkdir(exist_ok=True)
            # A file: URI, so that a folder's name with a colon or a blank stays a path.
            uri, place = f"sqlite:///{home / 'mlflow.db'}", (home / "artifacts").as_uri()
        self._client = self._tracking.MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "guywire")
        known = self._client.get_experiment_by_name(name)
        self._experiment = (
            self._client.create_experiment(name, artifact_location=place)
            if known is None
            else known.experiment_id
        )
        tags = {"guywire.run": event.run, "guywire.kind": "comparison"}
        for run in self._found(tags):
            self._parent = run.info.run_id
            self._client.update_run(self._parent, status="RUNNING")
            return
        self._parent = self._make(event.folder.resolve().name, tags)
        self._fill(self._parent, event.params, [])

    def _trial(self, event: TrialEnded) -> None:
        tags = {"guywire.run": event.run, "guywire.trial": event.name}
        for run in self._found(tags):
            if run.info.status == "FINISHED":
                return
            self._client.delete_run(run.info.run_id)  # a kill left it half told
        run_id = self._make(event.name, {**tags, "mlflow.parentRunId": self._parent})
        points = [(n, step, v) for n, curve in event.curves.items() for step, v in curve]
        last = max((step for _, step, _ in points), default=0)
        points += [(name, last, value) for name, value in event.metrics.items()]
        self._fill(run_id, event.params, points)
        self._client.set_terminated(run_id, "FINISHED")

    def _end(self, event: Ended) -> None:
        self._fill(self._parent, {}, [(name, 0, v) for name, v in event.metrics.items()])
        for path in event.files:
            self._client.log_artifact(self._parent, str(path))
        for trial, why in event.failed.items():
            self._client.set_tag(self._parent, f"guywire.failed.{trial}", why[:_LONGEST])
        status = {"done": "FINISHED", "failed": "FAILED"}.get(event.status, "KILLED")
        self._client.set_terminated(self._parent, status)

    def _found(self, tags: Mapping[str, str]) -> list[Any]:
        words = [f"tags.`{key}` = '{value}'" for key, value in tags.items()]
        return list(self._client.search_runs([self._experiment], " and ".join(words)))

    def _make(self, name: str, tags: Mapping[str, str]) -> str:
        return self._client.create_run(self._experiment, run_name=name, tags=dict(tags)).info.run_id

    def _fill(
        self, run_id: str, params: Mapping[str, Scalar], points: Sequence[tuple[str, int, float]]
    ) -> None:
        now = int(time.time() * 1000)
        words = [self._entities.Param(n, str(v)[:_LONGEST]) for n, v in params.items()]
        numbers = [self._entities.Metric(n, v, now, step) for n, step, v in points]
        for i in range(0, len(words), _PARAMS):
            self._client.log_batch(run_id, params=words[i : i + _PARAMS])
        for i in range(0, len(numbers), _METRICS):
            self._client.log_batch(run_id, metrics=numbers[i : i + _METRICS])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines of database migrations and the deprecations inside MLflow."""
    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
