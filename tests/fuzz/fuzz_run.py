"""Feed malformed inputs to Guywire, and watch: exceptions, time, memory, and files written elsewhere.

A *format* makes the input number ``i`` of a seed in an empty folder, and returns what reads it. It may
succeed or raise a ``GuywireError`` of one sentence; anything else is a finding. Inputs depend on format,
seed and number alone, so ``python fuzz_run.py FORMAT SEED NUMBER`` repeats a finding.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 5.0  # of the processor, for one input
SILENCE = 120.0  # of the clock, until a child counts as hung
GROWTH = 400 << 20  # bytes by which one input may raise the peak of resident memory
SENTENCE = 4000  # characters of an error, at most

Read = Callable[[], Any]
Make = Callable[[np.random.Generator, "Place"], Read]


@dataclass(frozen=True)
class Place:
    """Where an input lies, and where its reader may write."""

    base: Path

    @property
    def source(self) -> Path:
        return self.base / "a" / "b" / "in"

    @property
    def out(self) -> Path:
        return self.base / "a" / "b" / "out"

    def make(self) -> None:
        for folder in (self.source, self.out):
            folder.mkdir(parents=True)
        (self.base / "a" / "witness").write_bytes(b"untouched")
        (self.base / "a" / "b" / "witness.json").write_bytes(b"untouched")

    def elsewhere(self) -> dict[str, tuple[int, int, int]]:
        """All files but those in the folder for output: size, time and kind."""
        found = {}
        allowed = str(self.out)
        for path, folders, names in os.walk(self.base):
            if path == allowed:
                folders[:] = []
                continue
            for name in (*folders, *names):
                about = os.lstat(os.path.join(path, name))
                folder = name in folders
                found[os.path.join(path, name)] = (
                    about.st_mode,
                    0 if folder else about.st_size,
                    0 if folder else about.st_mtime_ns,
                )
        return found


class TooLong(BaseException):
    """No Exception, so that no reader takes it for a damaged file."""


class Elsewhere(BaseException):
    """Something was written outside the folder for output."""


_allowed: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _allowed:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = isinstance(mode, str) and set(mode) & set("wax+")
        writes = writes or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        touched = [path] if writes else []
    elif event in ("os.rename", "os.link", "os.symlink"):
        touched = list(arguments[:2] if event == "os.rename" else arguments[1:2])
    elif event in ("os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree"):
        touched = [arguments[0]]
    else:
        return
    for path in touched:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike):
            continue  # a handle
        folder, name = os.path.split(os.path.abspath(path))
        real = os.path.join(os.path.realpath(folder), name)
        if real != os.devnull and not any(real.startswith(prefix) for prefix in _allowed):
            raise Elsewhere(f"{event} {real}")


_hooked = False


@contextmanager
def _watched(place: Place, seconds: float) -> Iterator[None]:
    global _hooked
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True

    def ring(*_: Any) -> None:
        raise TooLong(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, ring)
    # pytest's own timeout uses the clock's timer; this is the processor's.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    _allowed.append(os.path.realpath(place.out))
    try:
        yield
    finally:
        _allowed.clear()
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    return 0


def _reset_peak() -> int:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def one(make: Make, name: str, seed: int, number: int, home: Path) -> tuple[str, str]:
    """Make and read one input: ``("read", "")``, ``("refused", sentence)`` or ``("FINDING", why)``."""
    from guywire.core.errors import GuywireError

    generator = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
    place = Place(Path(tempfile.mkdtemp(dir=home)))
    place.make()
    cwd = os.getcwd()
    try:
        try:
            read = make(generator, place)
        except Skipped:
            return "skipped", ""
        before, peak = place.elsewhere(), _reset_peak()
        os.chdir(place.out)
        outcome = ("read", "")
        try:
            with _watched(place, SECONDS):
                read()
        except GuywireError as error:
            outcome = ("refused", str(error))
            if "Traceback" in str(error) or len(str(error)) > SENTENCE or not str(error).strip():
                outcome = ("FINDING", f"no sentence: {str(error)[:300]!r}")
        except Skipped:
            outcome = ("skipped", "")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = ("FINDING", "".join(traceback.format_exception(error))[-4000:])
        if (grown := _peak() - peak) > GROWTH:
            outcome = ("FINDING", f"{grown >> 20} MiB of memory, then {outcome}")
        after = place.elsewhere()
        if after != before:
            changed = sorted(
                k for k in before.keys() | after.keys() if before.get(k) != after.get(k)
            )
            outcome = ("FINDING", f"changed outside the output: {changed[:5]}, then {outcome}")
        return outcome
    finally:
        os.chdir(cwd)
        shutil.rmtree(place.base, ignore_errors=True)


class Skipped(Exception):
    """The mutation made nothing that can be tried here."""


@dataclass
class Tally:
    """What became of the inputs of one format."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, str]] = field(default_factory=list)
    sentences: set[str] = field(default_factory=set)

    @property
    def tried(self) -> int:
        return sum(self.outcomes.values()) - self.outcomes["skipped"]

    def add(self, number: int, outcome: str, why: str) -> None:
        self.outcomes[outcome] += 1
        if outcome == "FINDING":
            self.findings.append((number, why))
        elif outcome == "refused":
            self.sentences.add(re.sub(r"/\S*|\d+", "", why)[:60])


def formats() -> dict[str, Make]:
    """All formats by name."""
    import fuzz_data
    import fuzz_weights

    return {**fuzz_data.FORMATS, **fuzz_weights.FORMATS}


def in_process(name: str, seed: int, numbers: range, home: Path) -> Tally:
    """Try inputs in this process: no limit of memory, a hang in C is found by pytest's timeout."""
    tally, make = Tally(name), formats()[name]
    for number in numbers:
        tally.add(number, *one(make, name, seed, number, home))
    return tally


def in_children(name: str, seed: int, count: int, home: Path, most: int = 20) -> Tally:
    """Try inputs in a child that lives long; one that dies or falls silent is a finding."""
    tally, number = Tally(name), 0
    while number < count and len(tally.findings) < most:
        log = home / f"{name}.log"
        with log.open("wb") as errors:
            child = subprocess.Popen(
                [sys.executable, __file__, name, str(seed), f"{number}:{count}", str(home)],
                stdout=subprocess.PIPE, stderr=errors, cwd=home,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        assert child.stdout is not None
        os.set_blocking(child.stdout.fileno(), True)
        try:
            while (line := _line(child.stdout.fileno(), SILENCE)) is not None:
                found, outcome, why = json.loads(line)
                tally.add(found, outcome, why)
                number = found + 1
                if len(tally.findings) >= most:
                    break
        finally:
            silent = child.poll() is None
            child.kill()
            code = child.wait()
            child.stdout.close()
        if number < count and len(tally.findings) < most:
            said = log.read_text(errors="replace")[-1500:]
            how = "fell silent" if silent else f"died with {code}"
            tally.add(number, "FINDING", f"the process {how} at this input: {said}")
            number += 1
    return tally


_rests: dict[int, bytes] = {}


def _line(handle: int, patience: float) -> bytes | None:
    import select

    rest = _rests.pop(handle, b"")
    while b"\n" not in rest:
        ready, _, _ = select.select([handle], [], [], patience)
        piece = os.read(handle, 1 << 16) if ready else b""
        if not piece:
            return None
        rest += piece
    line, _, rest = rest.partition(b"\n")
    if rest:
        _rests[handle] = rest
    return line


def _main() -> None:
    name, seed, numbers, *rest = sys.argv[1:]
    import torch

    torch.set_num_threads(1)
    make = formats()[name]
    if ":" not in numbers:
        with tempfile.TemporaryDirectory():
            pass
        return
    start, stop = map(int, numbers.split(":"))
    # A first, sound look loads whatever is imported late; then memory gets its limit.
    one(make, name, int(seed), 1 << 40, Path(rest[0]))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, hard))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    channel = os.dup(1)
    os.dup2(2, 1)
    for number in range(start, stop):
        outcome = one(make, name, int(seed), number, Path(rest[0]))
        os.write(channel, json.dumps([number, *outcome]).encode() + b"\n")


if __name__ == "__main__":
    sys.modules["fuzz_run"] = sys.modules["__main__"]
    sys.path.insert(0, str(Path(__file__).parent))
    _main()
