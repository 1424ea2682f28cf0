"""Progress of a comparison on standard error: a bar for people, lines for log files."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from guywire.cli import console

__all__ = ["Display"]


class Display:
    """Show how far the trials are, by reading their ``progress.json``.

    Args:
        quiet: show nothing at all.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.log = console.log()
        self.total = self.ended = 0
        self.trials: Path | None = None
        self._bar: Progress | None = None
        self._task: Any = None
        self._read_at = 0.0

    def begin(self, folder: Path, total: int, already: int) -> None:
        """Start to show.

        Args:
            folder: of the run.
            total: trials in all.
            already: trials that are finished.
        """
        self.trials, self.total = folder / "trials", total
        if self.quiet:
            return
        going_on = f", {already} of them done before" if already else ""
        self.log.print(f"[bold]{folder}[/bold]: {total} trials{going_on}")
        if self.log.is_terminal:
            self._bar = Progress(
                TextColumn("{task.fields[ended]}/{task.fields[all]} trials"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[now]}"),
                console=self.log,
                transient=True,
            )
            self._task = self._bar.add_task("", total=1.0, ended=0, all=total, now="")
            self._bar.start()

    def done(self, name: str, error: str | None, accuracy: float | None) -> None:
        """Tell that a trial ended.

        Args:
            name: of the trial.
            error: why it failed, if it did.
            accuracy: its final accuracy.
        """
        self.ended += 1
        if self.quiet:
            return
        if error is not None:
            self.log.print(f"[red]failed[/red] {error}", markup=True)
        elif self._bar is None:
            shown = "" if accuracy is None else f": accuracy {100 * accuracy:.1f}%"
            self.log.print(f"{self.ended}/{self.total} {name}{shown}", markup=False)
        self.tick(force=True)

    def remark(self, text: str) -> None:
        """Say something beside the bar.

        Args:
            text: a sentence.
        """
        self.log.print(text, markup=False)

    def tick(self, force: bool = False) -> None:
        """Look again.

        Args:
            force: even if it was a moment ago.
        """
        now = time.monotonic()
        if self._bar is None or self.trials is None or (now - self._read_at < 0.5 and not force):
            return
        self._read_at = now
        running = []
        share = float(self.ended)
        folders = (self.trials, self.trials.with_name("sweep"))
        for path in sorted(p for folder in folders for p in folder.glob("*/progress.json")):
            if (path.parent / "result.json").exists() or (path.parent / "error.json").exists():
                continue
            with contextlib.suppress(OSError, ValueError, KeyError, ZeroDivisionError):
                state = json.loads(path.read_text(encoding="utf-8"))
                share += state["step"] / state["total"]
                running.append(f"{path.parent.name} task {state['task'] + 1}")
        self._bar.update(
            self._task,
            completed=min(1.0, share / max(1, self.total)),
            ended=self.ended,
            now=", ".join(running[:3]),
        )

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
