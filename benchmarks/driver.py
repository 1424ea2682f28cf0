"""Runs sides in turn: each a process of its own that has prepared and waits for its next repetition.

Every repetition asks each thing of each side once, sides taking turns, so that what disturbs the
machine disturbs all alike; ratios are formed within a repetition.
"""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Cost", "Row", "Side", "SideFailed", "alternate", "ratio", "row", "spread", "verdict"]

SIDES = Path(__file__).resolve().parent / "sides"
Answers = dict[str, list[dict[str, Any]]]
"""Of one side: for each thing what it answered, repetition by repetition."""


class SideFailed(RuntimeError):
    """A side could not start, died, or did not answer; says why."""


def limited(threads: int) -> dict[str, str]:
    """The surroundings of a side: so many threads, offline, nothing of ours on its path."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    count = {f"{k}_NUM_THREADS": str(threads) for k in ("OMP", "MKL", "OPENBLAS")}
    return kept | count | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def anonymous_mb(pid: int) -> float:
    """Private memory of a process now; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("RssAnon")), 0.0)


class Side:
    """A process that waits to be asked.

    Args:
        python: its interpreter.
        script: a script of ``benchmarks/sides``, or any that speaks its protocol.
        given: its parameters.
        timeout: seconds for each answer.
        watch: sample its private memory while it works.

    Raises:
        SideFailed: it did not get ready.
    """

    def __init__(
        self,
        python: str | os.PathLike[str],
        script: str | os.PathLike[str],
        given: Mapping[str, Any],
        *,
        timeout: float = 600.0,
        watch: bool = False,
    ) -> None:
        self.timeout, self.watch = timeout, watch
        self._left = b""
        self.child = subprocess.Popen(
            [str(python), str(SIDES / script), json.dumps(dict(given))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=limited(given.get("threads", 1)),
            start_new_session=True,
        )
        try:
            hello = self._hear()
            if "error" in hello:
                raise SideFailed(hello["error"])
        except SideFailed:
            self.close()
            raise
        self.about: dict[str, Any] = hello.get("about", {})
        self.things: list[str] = hello.get("things", [])
        self.started_mb = anonymous_mb(self.child.pid)

    def _hear(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        until = time.monotonic() + self.timeout
        while b"\n" not in self._left:
            ready, _, _ = select.select(
                [self.child.stdout], [], [], max(0.0, until - time.monotonic())
            )
            if not ready:
                raise SideFailed(f"no answer in {self.timeout:g} s")
            got = os.read(self.child.stdout.fileno(), 1 << 16)
            if not got:
                raise SideFailed(f"ended with code {self.child.wait()} before it answered")
            self._left += got
        line, self._left = self._left.split(b"\n", 1)
        try:
            return json.loads(line)
        except ValueError as error:
            raise SideFailed(f"said {line[:60]!r}, which is no JSON") from error

    def run(self, thing: str) -> dict[str, Any]:
        """Ask for a thing once.

        Raises:
            SideFailed: it died or did not answer. An error inside the thing is an answer.
        """
        assert self.child.stdin is not None
        highest, over = 0.0, threading.Event()

        def look() -> None:
            nonlocal highest
            while not over.wait(0.01):
                highest = max(highest, anonymous_mb(self.child.pid))

        watcher = threading.Thread(target=look)
        if self.watch:
            watcher.start()
        try:
            self.child.stdin.write((json.dumps({"run": thing}) + "\n").encode())
            self.child.stdin.flush()
            found = self._hear()
        except BrokenPipeError as error:
            raise SideFailed("died between two repetitions") from error
        finally:
            over.set()
            if self.watch:
                watcher.join()
        if self.watch:
            # beyond the start, not beyond the last repetition: allocators keep what they had
            found |= {"private_mb": highest, "grown_mb": max(highest - self.started_mb, 0.0)}
        return found

    def close(self) -> None:
        """End the process and what it started."""
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue


def alternate(
    sides: Mapping[str, Side], repeats: int, order: Sequence[str] | None = None
) -> tuple[dict[str, Answers], dict[str, str]]:
    """Let sides take turns; return their answers, and why any thing or side dropped out.

    Args:
        sides: by name.
        repeats: of everything.
        order: of things; sorted if ``None``.
    """
    answers: dict[str, Answers] = {name: {} for name in sides}
    out: dict[str, str] = {}
    things = order or sorted({t for side in sides.values() for t in side.things})
    for _ in range(repeats):
        for thing in things:
            for name, side in sides.items():
                label = f"{name}/{thing}"
                if thing not in side.things or name in out or label in out:
                    continue
                try:
                    found = side.run(thing)
                except SideFailed as error:
                    out[name] = str(error)
                    continue
                if "error" in found:
                    out[label] = found["error"]
                    answers[name].pop(thing, None)
                    continue
                answers[name].setdefault(thing, []).append(found)
    return answers, out


@dataclass(frozen=True)
class Cost:
    """What a number in a row is made of: a thing of a side, over another of the same side.

    Attributes:
        side: name of the side.
        thing: what is measured.
        base: what it is divided by, repetition by repetition; nothing if ``None``.
        key: what is read from the answers.
    """

    side: str
    thing: str
    base: str | None = None
    key: str = "seconds"

    def read(self, answers: Mapping[str, Answers]) -> list[float] | None:
        """Return one number a repetition, or ``None`` if it was not measured."""
        of = answers.get(self.side, {})
        if not of.get(self.thing) or (self.base and not of.get(self.base)):
            return None
        found = [float(a[self.key]) for a in of[self.thing]]
        if self.base is None:
            return found
        return [x / a[self.key] for x, a in zip(found, of[self.base], strict=False)]


@dataclass
class Row:
    """A line of the table.

    Attributes:
        group: name of the comparison.
        figure: what is measured.
        unit: of ours and the peer's, such as ``"plain steps"`` or ``"s"``.
        peer: its name, or what ours is beside.
        ours: ``median``, ``low``, ``high``, and ``each`` repetition; ``None`` if not measured.
        theirs: likewise.
        ratio: of ours to theirs, formed within repetitions.
        limit: that ours promises to keep, if any.
        verdict: in words.
        note: what a reader should know.
    """

    group: str
    figure: str
    unit: str
    peer: str
    ours: dict[str, Any] | None
    theirs: dict[str, Any] | None
    ratio: dict[str, Any] | None
    limit: float | None = None
    verdict: str = ""
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest, highest, and all of them.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'low': 1.0, 'high': 3.0, 'each': [3.0, 1.0, 2.0]}
    """
    each = [float(v) for v in values]
    return {
        "median": float(statistics.median(each)),
        "low": min(each),
        "high": max(each),
        "each": each,
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ours over theirs, repetition by repetition."""
    return spread([a / b for a, b in zip(ours, theirs, strict=False)])


def verdict(
    ratio: Mapping[str, Any] | None,
    ours: Mapping[str, Any] | None = None,
    limit: float | None = None,
    note: str = "",
) -> str:
    """Say in words who wins, where less is better, and whether a limit is kept.

    >>> verdict({"median": 0.5, "low": 0.4, "high": 0.6})
    'we win'
    >>> verdict({"median": 1.5, "low": 1.4, "high": 1.6}, {"median": 3.0}, 2.9)
    'we lose; limit 2.9 missed'
    >>> verdict(None, note="mergekit: no room")
    'not measured: mergekit: no room'
    """
    said = []
    if ratio is not None:
        if ratio["high"] < 1.0:
            said.append("we win")
        elif ratio["low"] > 1.0:
            said.append("we lose")
        elif ratio["median"] > 1.0:
            said.append("we lose in the median; the spread reaches 1")
        elif ratio["median"] < 1.0:
            said.append("we win in the median; the spread reaches 1")
        else:
            said.append("even")
    elif limit is None or ours is None:
        said.append(f"not measured: {note or 'no reason given'}")
    if limit is not None and ours is not None:
        said.append(f"limit {limit:g} {'kept' if ours['median'] <= limit else 'missed'}")
    return "; ".join(said)


def row(
    answers: Mapping[str, Answers],
    out: Mapping[str, str],
    group: str,
    figure: str,
    unit: str,
    ours: Cost,
    peer: str,
    theirs: Cost,
    *,
    limit: float | None = None,
    note: str = "",
) -> Row:
    """Make a line from what two sides answered."""
    a, b = ours.read(answers), theirs.read(answers)
    found = ratio(a, b) if a and b else None
    left = spread(a) if a else None
    right = spread(b) if b else None
    why = ""
    for cost, values in ((ours, a), (theirs, b)):
        if not values:
            labels = [cost.side, f"{cost.side}/{cost.thing}", f"{cost.side}/{cost.base}"]
            why = next((out[x] for x in labels if x in out), f"{cost.side} has no {cost.thing}")
    said = verdict(found, left, limit, why)
    if not found and "not measured" not in said:
        said += f"; {peer} not measured: {why}"
    return Row(group, figure, unit, peer, left, right, found, limit, said, note)
