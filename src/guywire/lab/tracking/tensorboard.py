"""TensorBoard: event files in the run's folder, one folder a trial."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from guywire.core.errors import need
from guywire.lab.tracking.events import Ended, Event, TrialEnded

__all__ = ["TensorBoard"]


class TensorBoard:
    """Write ``<run>/tensorboard/<trial>``: ``tensorboard --logdir <run>/tensorboard`` shows them.

    A trial's folder is written aside and renamed, so it is whole, and there once.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        need("tensorboard", extra="tensorboard")

    def log(self, event: Event) -> None:
        """Write a trial that ended, or the means of a comparison that did.

        Args:
            event: what happened.
        """
        home = event.folder / "tensorboard"
        if isinstance(event, TrialEnded):
            params = {name: _plain(value) for name, value in event.params.items()}
            with _Writing(home / event.name) as writer:
                for name, points in event.curves.items():
                    for step, value in points:
                        writer.add_scalar(name, value, step)
                last = max((p[-1][0] for p in event.curves.values() if p), default=0)
                for name, value in event.metrics.items():
                    writer.add_scalar(name, value, last)
                writer.add_hparams(params, dict(event.metrics), run_name=".", global_step=last)
        elif isinstance(event, Ended) and event.metrics:
            with _Writing(home / "means") as writer:
                for name, value in event.metrics.items():
                    writer.add_scalar(name, value, 0)


class _Writing:
    """A writer into a folder that appears when all is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.aside = folder.with_name(f".{folder.name}.tmp")

    def __enter__(self) -> Any:
        shutil.rmtree(self.aside, ignore_errors=True)
        module = need("torch.utils.tensorboard", extra="tensorboard")
        self.writer = module.SummaryWriter(str(self.aside))
        return self.writer

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.writer.close()
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.aside.rename(self.folder)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)
