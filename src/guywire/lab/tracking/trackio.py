"""Trackio: one run a trial, the comparison as their group."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from guywire.core.errors import need
from guywire.lab.tracking.events import Began, Ended, Event, TrialEnded

__all__ = ["Trackio"]


class Trackio:
    """Log to Trackio's local store, or to the Space or server that ``TRACKIO_SPACE_ID`` names.

    The project is ``guywire``, or what ``TRACKIO_PROJECT`` says. Runs are named
    ``<folder>/<trial>``, and ``<folder>/means`` has the means over seeds.

    Raises:
        MissingExtraError: Trackio is not installed.
    """

    def __init__(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # it greets; standard output is for results
            self._trackio: Any = need("trackio", extra="trackio")
        self._params: Mapping[str, Any] = {}

    def log(self, event: Event) -> None:
        """Log a trial that ended, or the means of a comparison that did.

        Args:
            event: what happened.
        """
        if isinstance(event, Began):
            self._params = event.params
        elif isinstance(event, TrialEnded):
            rows: dict[int, dict[str, float]] = {}
            for name, points in event.curves.items():
                for step, value in points:
                    rows.setdefault(step, {})[name] = value
            last = max(rows, default=0)
            rows.setdefault(last, {}).update(event.metrics)
            self._run(event, event.name, {**self._params, **event.params}, rows)
        elif isinstance(event, Ended) and event.metrics:
            self._run(event, "means", dict(self._params), {0: dict(event.metrics)})

    def _run(
        self,
        event: Event,
        name: str,
        config: dict[str, Any],
        rows: Mapping[int, dict[str, float]],
    ) -> None:
        group = event.folder.resolve().name
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "guywire"),
                name=f"{group}/{name}",
                group=group,
                config=config,
                resume="allow",
                embed=False,
            )
            try:
                for step in sorted(rows):
                    self._trackio.log(rows[step], step=step)
            finally:
                self._trackio.finish()
