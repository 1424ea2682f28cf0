"""Test settings for the whole project: one thread a worker, code blocks of the pages, loud skips."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

# One thread a worker, before torch is imported: more would fight over the same two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

torch.set_num_threads(1)

# A shell's background jobs, and nohup's, ignore these, and children inherit that: tests that
# interrupt a command would wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    setup=lambda namespace: torch.manual_seed(0),
).pytest()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep tests on one worker that share more than their file.

    Blocks of a page go on from each other's names; tests of several processes start these once.
    Marks cannot say so: pytest 9.2 no longer shows xdist the group that it writes into a test's id.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByPage(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if file.endswith(".md") or "distributed" in file else nodeid

    return ByPage(config, log)


@pytest.fixture(autouse=True)
def _quiet_randomness() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data_folder() -> Path:
    """Return the data folder, or skip the test where there is none."""
    folder = os.environ.get("GUYWIRE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs the data folder: set GUYWIRE_DATA")
    return Path(folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly how many tests were skipped for want of data or a browser."""
    for word, sign, remedy in (
        ("data folder", "guywire_data", "set GUYWIRE_DATA"),
        ("browser", "browser", "install chromium"),
    ):
        skipped = [
            report
            for report in terminalreporter.stats.get("skipped", [])
            if sign in str(getattr(report, "longrepr", "")).lower()
        ]
        if skipped:
            terminalreporter.write_line(
                f"!!! {len(skipped)} tests were skipped for want of a {word}: {remedy}", yellow=True
            )
