"""What the report says is what the files say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from guywire.lab.report import render
from guywire.lab.report.stats import interval

Make = Callable[..., Path]
TablesOf = Callable[[str], dict[str, list[list[str]]]]


def results(folder: Path) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("trials/*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(result["method"], []).append(result)
    return found


def cell(values: list[float], scale: float) -> tuple[float, float, float]:
    spread = interval(values)
    assert spread is not None
    assert spread.low is not None
    assert spread.high is not None
    return spread.mean * scale, spread.low * scale, spread.high * scale


def numbers(text: str) -> tuple[float, float, float]:
    mean, ends = text.split("|")
    low, high = ends.split(" to ")
    return float(mean), float(low), float(high)


@pytest.mark.parametrize(
    ("heading", "metric", "scale"),
    [
        ("Accuracy|all classes, %", "accuracy", 100),
        ("Forgetting|points", "forgetting", 100),
        ("Learning accuracy|right after a task, %", "learning_accuracy", 100),
        ("min-ACC|%", "min_acc", 100),
        ("WC-ACC|%", "wc_acc", 100),
        ("Time|seconds a trial", "seconds", 1),
    ],
)
def test_summary_equals_the_files(
    finished_run: Path, tables_of: TablesOf, heading: str, metric: str, scale: float
) -> None:
    table = tables_of((finished_run / "report.html").read_text())[
        "Mean over seeds, with its 95% interval (Student's t) below"
    ]
    column = table[0].index(heading)
    expected = results(finished_run)
    assert {row[0] for row in table[1:]} == set(expected)
    for row in table[1:]:
        values = [r["metrics"][metric] for r in expected[row[0]]]
        assert numbers(row[column]) == pytest.approx(cell(values, scale), abs=0.0501)
        assert row[-1] == "3"


def test_rows_are_ordered_by_accuracy(finished_run: Path, tables_of: TablesOf) -> None:
    table = tables_of((finished_run / "report.html").read_text())[
        "Mean over seeds, with its 95% interval (Student's t) below"
    ]
    means = [numbers(row[1])[0] for row in table[1:]]
    assert means == sorted(means, reverse=True)


def test_heat_maps_equal_the_files(finished_run: Path, tables_of: TablesOf) -> None:
    tables = tables_of((finished_run / "report.html").read_text())
    expected = results(finished_run)
    for method, trials in expected.items():
        rows = next(t for name, t in tables.items() if name.startswith(f"{method}: accuracy on"))
        matrix = np.array([t["accuracy_matrix"] for t in trials], dtype=float).mean(0)
        for i, row in enumerate(rows[1:]):
            assert row[0] == str(i + 1)
            for j, text in enumerate(row[1:]):
                if j > i:
                    assert text == "none"
                else:
                    assert abs(float(text) - 100 * matrix[i, j]) <= 0.5001


def test_lowest_points_equal_the_curves(finished_run: Path, tables_of: TablesOf) -> None:
    table = tables_of((finished_run / "report.html").read_text())[
        "Lowest points of the mean curves"
    ]
    for method, task, learnt, low, at, end in (r for r in table[1:] if r[0] == "replay"):
        curves = []
        for path in sorted(finished_run.glob(f"trials/{method}-seed*/metrics.parquet")):
            frame = pq.read_table(path).to_pandas()
            mine = frame[(frame.metric == "accuracy") & (frame.evaluated == int(task) - 1)]
            curves.append(mine.set_index("step").value)
        mean = sum(curves) / len(curves)
        border = 60 * int(task)
        later = mean[mean.index > border]
        assert float(learnt) == pytest.approx(100 * mean[border], abs=0.0501)
        assert float(low) == pytest.approx(100 * later.min(), abs=0.0501)
        assert int(at) == later.idxmin()
        assert float(end) == pytest.approx(100 * mean.iloc[-1], abs=0.0501)


def test_headline_names_who_forgot_least(finished_run: Path) -> None:
    means = {
        m: float(np.mean([r["metrics"]["forgetting"] for r in trials]))
        for m, trials in results(finished_run).items()
        if m != "joint"
    }
    best = min(means, key=lambda m: means[m])
    html = (finished_run / "report.html").read_text()
    assert f'<p class="headline">{best} forgot least: {100 * means[best]:.1f} points' in html


def test_what_is_needed_to_run_it_again(finished_run: Path) -> None:
    html = (finished_run / "report.html").read_text()
    assert "guywire compare --seeds 3 --out &#39;my run&#39;" in html
    assert "epochs = 10" in html
    assert "2.13.0" in html
    assert html.count("data:image/png;base64,") == 5
    assert (finished_run / "report.html").stat().st_size < 6_000_000


def test_a_finished_run_has_no_notice(finished_run: Path) -> None:
    assert 'role="note"' not in (finished_run / "report.html").read_text()


def test_names_are_text_wherever_they_come_from(make_run: Make) -> None:
    nasty = "<script>alert(1)</script>"
    folder = make_run(seeds=2, tasks=2, class_names=[nasty, "b&b", '"c"', "d"])
    for path in folder.glob("trials/l2-seed*/result.json"):
        result = json.loads(path.read_text()) | {"method": f"l2{nasty}"}
        path.write_text(json.dumps(result))
    config = folder / "config.toml"
    config.write_text(config.read_text().replace('"l2"', f'"l2{nasty}"') + f"# {nasty}\n")
    stream = json.loads((folder / "stream.json").read_text())
    stream |= {"name": nasty, "notes": [nasty]}
    stream["tasks"][0]["name"] = nasty
    (folder / "stream.json").write_text(json.dumps(stream))
    html = render(folder).read_text()
    assert html.count("<script>") == 1  # the page's own
    assert "alert(1)" in html


def test_texts_are_shown_for_streams_of_texts(make_run: Make) -> None:
    html = render(make_run(seeds=2, tasks=2, text=True)).read_text()
    assert "sentence 1.2 &lt;b&gt;of&lt;/b&gt; a task" in html
    assert "data:image/png" not in html


def test_failed_and_missing_trials_are_named(make_run: Make, tables_of: TablesOf) -> None:
    folder = make_run(seeds=3, tasks=2, status="failed")
    broken = folder / "trials" / "ewc-seed1"
    (broken / "result.json").unlink()
    (broken / "error.json").write_text(json.dumps({"error": "the loss is NaN at step 7"}))
    shutil.rmtree(folder / "trials" / "l2-seed2")
    html = render(folder).read_text()
    assert "1 of 21 trials failed" in html
    assert "ewc-seed1: the loss is NaN at step 7" in html
    assert "1 of 21 trials has no result" in html
    assert "l2-seed2: it has not started" in html
    table = tables_of(html)["Mean over seeds, with its 95% interval (Student's t) below"]
    assert {row[0]: row[-1] for row in table[1:]}["ewc"] == "2"
    left = [
        json.loads((folder / "trials" / f"ewc-seed{k}" / "result.json").read_text()) for k in (0, 2)
    ]
    row = next(r for r in table if r[0] == "ewc")
    expected = cell([r["metrics"]["accuracy"] for r in left], 100)
    assert numbers(row[1]) == pytest.approx(expected, abs=0.0501)


def test_a_run_that_has_only_begun(make_run: Make) -> None:
    folder = make_run(seeds=1, tasks=2, status="running")
    shutil.rmtree(folder / "trials")
    html = render(folder).read_text()
    assert "No trial has finished yet" in html
    assert "7 of 7 trials have no result" in html


def test_one_seed_gives_no_interval(make_run: Make, tables_of: TablesOf) -> None:
    html = render(make_run(seeds=1, tasks=3)).read_text()
    table = tables_of(html)["Mean over seeds, with its 95% interval (Student's t) below"]
    assert all("|" not in text for row in table[1:] for text in row)
    assert "one seed, all there is of replay and lwf, gives no interval" in html


def test_one_task_has_no_forgetting(make_run: Make) -> None:
    folder = make_run(seeds=2, tasks=2)
    for path in folder.glob("trials/*/result.json"):
        result = json.loads(path.read_text())
        result["accuracy_matrix"] = [[result["accuracy_matrix"][0][0]]]
        for name in ("forgetting", "backward_transfer", "min_acc"):
            result["metrics"][name] = None
        path.write_text(json.dumps(result))
    html = render(folder).read_text()
    assert "nothing can be said of forgetting" in html
    assert 'id="plane"' not in html


def test_a_large_run_stays_small(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(seeds=1, tasks=2)
    import pyarrow as pa

    rng = np.random.default_rng(0)
    steps = np.tile(np.arange(1, 20_001), 10)
    table = pa.table(
        {
            "step": steps,
            "task": (steps - 1) // 2000,
            "evaluated": np.repeat(np.arange(10), 20_000),
            "metric": ["accuracy"] * len(steps),
            "value": rng.random(len(steps)),
        }
    )
    for path in folder.glob("trials/*/metrics.parquet"):
        pq.write_table(table, path)
    assert render(folder).stat().st_size < 3_000_000


def test_rendering_twice_gives_the_same_page(make_run: Make) -> None:
    folder = make_run(seeds=2, tasks=2)
    first = render(folder).read_bytes()
    assert render(folder).read_bytes() == first
