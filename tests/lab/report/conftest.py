"""A run directory made by a small simulation, and a headless Chromium to look at reports with."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

# How much of what was learnt survives a switch at its worst, and what is won back by the end;
# how well a new task is learnt; seconds of a trial; megabytes kept.
BEHAVIOUR: dict[str, tuple[float, float, float, float, float]] = {
    "finetune": (0.02, 0.03, 0.97, 4.1, 0.0),
    "l2": (0.30, 0.42, 0.90, 4.6, 0.42),
    "ewc": (0.34, 0.47, 0.91, 5.2, 0.84),
    "lwf": (0.45, 0.66, 0.93, 6.8, 0.42),
    "feature-distillation": (0.08, 0.14, 0.94, 6.6, 0.42),
    "replay": (0.52, 0.88, 0.96, 7.9, 0.05),
    "joint": (0.97, 1.00, 0.97, 12.5, 0.0),
}
STEPS = 60


def simulate(
    behaviour: tuple[float, float, float, float, float], tasks: int, rng: np.random.Generator
) -> dict[int, list[tuple[int, int, float]]]:
    """Curves of every seen task: ``(step, task, accuracy)``, with a drop after each switch."""
    worst, kept, learns, *_ = behaviour
    level = np.zeros(tasks)
    curves: dict[int, list[tuple[int, int, float]]] = {k: [] for k in range(tasks)}
    for task in range(tasks):
        top = learns + rng.normal(0, 0.01)
        bottom = np.clip(worst + rng.normal(0, 0.04, tasks), 0, 1) * level
        end = np.clip(kept + rng.normal(0, 0.03, tasks), 0, 1) * level
        for step in range(1, STEPS + 1):
            fall = np.exp(-(((step - 6) / 5.0) ** 2)) if step > 6 else 1 - np.exp(-step / 1.5)
            back = 1 - np.exp(-step / 14)
            old = level + (end - level) * back
            old = old + (np.minimum(bottom, old) - old) * fall
            for k in range(task + 1):
                value = top * (1 - np.exp(-step / 8)) if k == task else old[k]
                value = float(np.round(np.clip(value + rng.normal(0, 0.012), 0, 1) * 100) / 100)
                curves[k].append((task * STEPS + step, task, value))
        for k in range(task + 1):
            level[k] = curves[k][-1][2]
    return curves


def summarise(curves: dict[int, list[tuple[int, int, float]]], tasks: int) -> dict[str, Any]:
    ends = {k: {step: v for step, _, v in c} for k, c in curves.items()}
    matrix = [
        [ends[j][(i + 1) * STEPS] if j <= i else None for j in range(tasks)] for i in range(tasks)
    ]
    last = [matrix[-1][j] for j in range(tasks)]
    learnt = [matrix[j][j] for j in range(tasks)]
    forgetting = float(np.mean([learnt[j] - last[j] for j in range(tasks - 1)]))
    lows = [min(v for s, _, v in curves[j] if s > (j + 1) * STEPS) for j in range(tasks - 1)]
    low = float(np.mean(lows))
    return {
        "accuracy_matrix": matrix,
        "metrics": {
            "accuracy": float(np.mean(last)),
            "average_accuracy": float(np.mean(last)),
            "forgetting": forgetting,
            "backward_transfer": -forgetting,
            "learning_accuracy": float(np.mean(learnt)),
            "min_acc": low,
            "wc_acc": last[-1] / tasks + (1 - 1 / tasks) * low,
        },
    }


def picture(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (32, 64), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_run(
    folder: Path,
    *,
    behaviour: Mapping[str, tuple[float, float, float, float, float]] | None = None,
    seeds: int = 3,
    tasks: int = 5,
    text: bool = False,
    class_names: list[str] | None = None,
    status: str = "done",
) -> Path:
    """Write a run directory as the design page describes it."""
    behaviour = BEHAVIOUR if behaviour is None else behaviour
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    names = class_names or [str(k) for k in range(2 * tasks)]
    methods = ", ".join(json.dumps(m) for m in behaviour)
    (folder / "config.toml").write_text(
        f'methods = [{methods}]\nseeds = {seeds}\nmodel = "mlp"\nepochs = 10\n\n'
        '[stream]\nname = "digits"\nscenario = "class"\n',
        encoding="utf-8",
    )
    run = {
        "command": ["guywire", "compare", "--seeds", str(seeds), "--out", "my run"],
        "versions": {"python": "3.11.2", "torch": "2.13.0", "guywire": "0.1.0"},
        "machine": {"processor": "x86_64", "cores": 2},
        "started": "2026-11-24T05:00:00+00:00",
        "finished": "2026-11-24T05:01:35+00:00",
        "status": status,
    }
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    listed = []
    for k in range(tasks):
        entry: dict[str, Any] = {
            "name": f"task-{k}",
            "classes": [2 * k, 2 * k + 1],
            "class_names": names[2 * k : 2 * k + 2],
            "sizes": {"train": 216 + k, "valid": 54, "test": 90},
        }
        if text:
            entry["samples"] = [
                {"text": f"sentence {k}.{i} <b>of</b> a task", "class": names[2 * k + i % 2]}
                for i in range(4)
            ]
        listed.append(entry)
    stream = {
        "name": "digits",
        "scenario": "class",
        "kind": "text" if text else "image",
        "class_names": names,
        "notes": [],
        "tasks": listed,
    }
    (folder / "stream.json").write_text(json.dumps(stream), encoding="utf-8")
    (folder / "samples").mkdir()
    if not text:
        for k in range(tasks):
            (folder / "samples" / f"task-{k}.png").write_bytes(picture(rng))
    for method, how in behaviour.items():
        for seed in range(seeds):
            write_trial(folder, method, seed, how, tasks, rng)
    return folder


def write_trial(
    folder: Path,
    method: str,
    seed: int,
    how: tuple[float, float, float, float, float],
    tasks: int,
    rng: np.random.Generator,
) -> None:
    directory = folder / "trials" / f"{method}-seed{seed}"
    directory.mkdir(parents=True)
    curves = simulate(how, tasks, rng)
    rows = [(s, t, k, "accuracy", v) for k, c in curves.items() for s, t, v in c]
    rows += [(s, s // STEPS, -1, "loss", 1.0 / s) for s in range(1, tasks * STEPS)]
    columns = list(zip(*rows, strict=True))
    table = pa.table(
        dict(zip(("step", "task", "evaluated", "metric", "value"), columns, strict=True))
    )
    pq.write_table(table, directory / "metrics.parquet")
    result = summarise(curves, tasks)
    seconds = how[3] * float(rng.uniform(0.93, 1.07))
    result |= {"method": method, "seed": seed, "seconds": seconds, "extra_memory_mb": how[4]}
    result["metrics"] |= {"seconds": seconds, "extra_memory_mb": how[4]}
    result["steps"] = tasks * STEPS
    (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")


def tried(number: int, values: dict[str, Any], accuracies: list[float | None]) -> dict[str, Any]:
    seeds: list[dict[str, Any]] = [
        {"seed": 1000 + k, "error": "it diverged"}
        if a is None
        else {"seed": 1000 + k, "accuracy": a, "forgetting": (1 - a) / 2}
        for k, a in enumerate(accuracies)
    ]
    known = [a for a in accuracies if a is not None]
    score = sum(known) / len(known) if len(known) == len(accuracies) else None
    return {"number": number, "values": values, "score": score, "seeds": seeds}


def sweep_document() -> dict[str, Any]:
    l2 = [tried(k, {"strength": 10.0**k}, [0.5 + 0.05 * k, 0.52 + 0.05 * k]) for k in range(4)]
    l2.append(tried(4, {"strength": 1e4}, [0.2, None]))
    replay = [
        tried(0, {"capacity": 50, "<b>": "a"}, [0.7, 0.72]),
        tried(1, {"capacity": 100, "<b>": "b"}, [0.8, 0.82]),
    ]
    return {
        "sampler": "grid",
        "metric": "accuracy",
        "minimised": False,
        "seeds": [1000, 1001],
        "evaluated_on": "valid",
        "not_tuned": ["finetune"],
        "methods": [
            {
                "method": "l2",
                "options": [{"name": "strength", "low": 1.0, "high": 1e4, "log": True}],
                "trials": l2,
                "best": 3,
                "chosen": {"strength": 1000.0},
                "score": 0.66,
                "edges": {},
            },
            {
                "method": "replay",
                "options": [
                    {"name": "capacity", "values": [50, 100], "log": False},
                    {"name": "<b>", "values": ["a", "b"], "log": False},
                ],
                "trials": replay,
                "best": 1,
                "chosen": {"capacity": 100, "<b>": "b"},
                "score": 0.81,
                "edges": {"capacity": "high"},
            },
        ],
    }


@pytest.fixture(scope="session")
def swept() -> dict[str, Any]:
    """A ``sweep.json``: one option with a value that diverged, and two options at an edge."""
    return sweep_document()


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a simulated run below the test's own folder."""

    def make(name: str = "run", **settings: Any) -> Path:
        return write_run(tmp_path / name, **settings)

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run with its report, for tests that only read."""
    from guywire.lab.report import render

    folder = write_run(tmp_path_factory.mktemp("runs") / "finished")
    render(folder)
    return folder


FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium; its absence skips, or fails where CI says that it must be there."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = "chromium and chromedriver are not installed"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}, and CI is set")
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome import service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=service.Service(driver))
    try:
        yield found
    finally:
        found.quit()


@pytest.fixture(scope="session")
def axe_source() -> str:
    """The script of axe-core, from whichever of two pinned packages is there (the newer first)."""
    for package in ("axe_playwright_python", "axe_core_python"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            return (Path(folder) / "axe.min.js").read_text(encoding="utf-8")
    reason = "axe-core is not installed (pip install axe-core-python)"
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI is set")
    pytest.skip(reason)


class Tables(HTMLParser):
    """The tables of a page as lists of rows of texts, by caption; hidden marks carry no text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self.rows: list[list[str]] = []
        self.caption = ""
        self.inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.rows, self.caption = [], ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")
        elif tag == "span" and self.inside[-1:] in (["td"], ["th"]) and self.rows[-1][-1]:
            self.rows[-1][-1] += "|"
        if tag in {"td", "th", "caption"}:
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in {"td", "th", "caption"}:
            self.inside.pop()
        elif tag == "table":
            self.found[self.caption] = self.rows

    def handle_data(self, data: str) -> None:
        if self.inside[-1:] == ["caption"]:
            self.caption += data
        elif self.inside:
            self.rows[-1][-1] += data


@pytest.fixture(scope="session")
def tables_of() -> Callable[[str], dict[str, list[list[str]]]]:
    """Parse a page's tables: caption to rows of cells, a cell's parts parted by a bar."""
    return lambda html: Tables(html).found
