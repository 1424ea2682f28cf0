"""What trackers are told, read back through their own readers."""

from __future__ import annotations

import json
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from guywire.cli import main
from guywire.core.errors import MissingExtraError, UsageError
from guywire.lab.tracking import Began, Ended, Follower, TrialEnded, make
from guywire.lab.tracking import follow as follow_module
from guywire.lab.training import CompareConfig, Outcome, TrialSpec

TRIALS = ["finetune-seed0", "l2-seed0", "finetune-seed1", "l2-seed1"]
TINY = [
    "--tasks",
    "2",
    "--max-per-class",
    "20",
    "--epochs",
    "1",
    "--batch-size",
    "16",
    "--seeds",
    "2",
    "--workers",
    "0",
]
WORDS = [*TINY, "--methods", "finetune,l2", "--option", "l2.strength=0.5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nobody followed."""
    folder = tmp_path_factory.mktemp("run") / "r"
    assert main(["compare", *WORDS, "--out", str(folder)]) == 0
    assert not (folder / "tracking.json").exists()
    return folder


def outcomes(run: Path) -> list[Outcome]:
    found = []
    for name in TRIALS:
        method, _, seed = name.partition("-seed")
        spec = TrialSpec(method=method, seed=int(seed), options={"l2": {"strength": 0.5}})
        result = json.loads((run / "trials" / name / "result.json").read_text())
        found.append(Outcome(spec, result, None))
    return found


def points(run: Path, trial: str, metric: str, evaluated: int) -> list[tuple[int, float]]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(run / "trials" / trial / "metrics.parquet").to_pylist()
    rows = [r for r in table if (r["metric"], r["evaluated"]) == (metric, evaluated)]
    assert rows
    return sorted((r["step"], r["value"]) for r in rows)


def expected(run: Path, trial: str) -> dict[str, float]:
    result = json.loads((run / "trials" / trial / "result.json").read_text())
    return {f"final/{k}": v for k, v in result["metrics"].items() if v is not None}


class Notes:
    """A tracker that remembers."""

    seen: list[Any]

    def __init__(self) -> None:
        self.seen = []

    def log(self, event: Any) -> None:
        self.seen.append(event)


def follow(
    monkeypatch: pytest.MonkeyPatch, run: Path, tracker: Any, told: list[Outcome], **more: Any
) -> list[str]:
    """Follow a run with a tracker; return the warnings."""
    monkeypatch.setattr(follow_module, "make", lambda words: dict.fromkeys(words, tracker))
    said: list[str] = []
    with Follower(["it"], said.append, **more) as follower:
        follower.begin(run, CompareConfig())
        for outcome in told:
            follower.trial(outcome)
        follower.end("done", [{"method": "l2", "accuracy": {"mean": 0.5, "low": None}}])
    return said


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, tmp_path / "r"))


def test_events_come_from_the_files_of_the_run(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Notes()
    failed = Outcome(TrialSpec(method="ewc"), None, "it broke")
    assert follow(monkeypatch, copied, tracker, [failed, *outcomes(copied)]) == []
    began, *trials, ended = tracker.seen
    assert isinstance(began, Began)
    assert began.params["stream.data"] == "digits"
    assert began.params["methods"].startswith("finetune,l2,ewc")
    assert "out" not in began.params
    assert [t.name for t in trials] == TRIALS
    second = trials[1]
    assert isinstance(second, TrialEnded)
    assert second.params == {"method": "l2", "seed": 0, "l2.strength": 0.5}
    assert "l2.strength" not in trials[0].params
    assert second.curves["loss"] == points(copied, "l2-seed0", "loss", -1)
    assert second.curves["accuracy/task-1"] == points(copied, "l2-seed0", "accuracy", 1)
    assert second.metrics == pytest.approx(expected(copied, "l2-seed0"))
    assert isinstance(ended, Ended)
    assert (ended.status, ended.metrics) == ("done", {"l2/accuracy": 0.5})
    assert [p.name for p in ended.files] == ["report.html", "results.parquet", "config.toml"]
    assert {e.run for e in tracker.seen} == {began.run}


def test_a_resumed_run_tells_only_what_is_new(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Notes(), Notes()
    follow(monkeypatch, copied, first, outcomes(copied)[:1])
    follow(monkeypatch, copied, second, outcomes(copied))
    names = [e.name for e in second.seen if isinstance(e, TrialEnded)]
    assert names == TRIALS[1:]
    assert second.seen[0].run == first.seen[0].run
    (copied / "tracking.json").write_text("{")  # damaged: all is told again
    third = Notes()
    follow(monkeypatch, copied, third, outcomes(copied))
    assert len(third.seen) == 6


def test_a_tracker_that_fails_is_told_no_more_and_warned_of_once(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Down(Notes):
        def log(self, event: Any) -> None:
            super().log(event)
            if len(self.seen) == 3:
                raise ConnectionError("no route to host\nmany\nlines")

    down, up = Down(), Notes()
    said = follow(monkeypatch, copied, down, outcomes(copied))
    assert len(down.seen) == 3
    assert said == [
        "tracking by it stopped (ConnectionError: no route to host); the comparison goes on, "
        "--resume tells what it missed"
    ]
    follow(monkeypatch, copied, up, outcomes(copied))
    assert [e.name for e in up.seen[1:-1]] == TRIALS[1:]


def test_a_tracker_that_hangs_is_given_up(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Stuck(Notes):
        def log(self, event: Any) -> None:
            release.wait(60)

    said = follow(monkeypatch, copied, Stuck(), outcomes(copied), patience=0.05)
    release.set()
    assert "is given up; the results are whole" in said[0]


def test_words_are_names_or_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tracker.py").write_text(
        "class Mine:\n    def log(self, event): pass\nclass Mute: pass\n"
        "class Picky:\n    def __init__(self, x): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert type(make(["my_tracker:Mine"])["my_tracker:Mine"]).__name__ == "Mine"
    for word, why in (
        ("wandb", "write mlflow, tensorboard, trackio, or package.module:Class"),
        ("my_tracker:Mute", r"no method log\(event\)"),
        ("my_tracker:Picky", "TypeError.*takes nothing"),
        ("nowhere_at_all:X", "ModuleNotFoundError.*importable"),
    ):
        with pytest.raises(UsageError, match=why):
            make([word])
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'guywire\[trackio\]'"):
        make(["trackio"])


def test_words_come_as_a_list_or_with_commas(capsys: pytest.CaptureFixture[str]) -> None:
    config = CompareConfig.model_validate({"track": ["mlflow, tensorboard", "mlflow"]})
    assert config.track == ("mlflow", "tensorboard")
    assert main(["compare", *TINY, "--track", "nothing"]) == 2
    assert "there is no tracker 'nothing'" in capsys.readouterr().err


def test_tensorboard_reads_what_was_written(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["compare", "--resume", "--out", str(copied), "--track", "tensorboard", "--json"]
    assert main(words) == 0
    table = {entry["method"]: entry for entry in json.loads(capsys.readouterr().out)["results"]}
    home = copied / "tensorboard"
    assert sorted(p.name for p in home.iterdir()) == sorted([*TRIALS, "means"])
    found = EventAccumulator(str(home / "l2-seed1")).Reload()
    for name, metric, evaluated in (("loss", "loss", -1), ("accuracy/task-0", "accuracy", 0)):
        wanted = points(copied, "l2-seed1", metric, evaluated)
        got = [(e.step, e.value) for e in found.Scalars(name)]
        assert [s for s, _ in got] == [s for s, _ in wanted]
        assert [v for _, v in got] == pytest.approx([v for _, v in wanted])
    for name, value in expected(copied, "l2-seed1").items():
        assert found.Scalars(name)[-1].value == pytest.approx(value)
    overall = EventAccumulator(str(home / "means")).Reload()
    assert overall.Scalars("l2/accuracy")[0].value == pytest.approx(table["l2"]["accuracy"]["mean"])
    files = sorted(home.rglob("events*"))
    assert main(words) == 0  # again: trials are there once
    assert [f for f in sorted(home.rglob("events*")) if "means" not in f.parts] == [
        f for f in files if "means" not in f.parts
    ]


def fake_trackio() -> Any:
    """A module with the signatures of Trackio 0.4 to 0.30 that are used, keeping what it is told."""
    module: Any = types.ModuleType("trackio")
    module.runs, module.open = {}, None

    def init(
        project: str,
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
        config: dict[str, Any] | None = None,
        resume: str = "never",
        embed: bool = True,
    ) -> None:
        assert module.open is None
        print("* Trackio greets")  # noqa: T201
        module.open = (project, name)
        module.runs[module.open] = {"group": group, "config": config, "rows": {}}

    def log(metrics: dict[str, float], step: int | None = None) -> None:
        module.runs[module.open]["rows"][step] = metrics

    def finish() -> None:
        assert module.open is not None
        module.open = None

    module.init, module.log, module.finish = init, log, finish
    return module


def test_trackio_gets_a_run_a_trial(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trackio = fake_trackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    words = ["compare", "--resume", "--out", str(copied), "--track", "trackio", "--json"]
    assert main(words) == 0
    json.loads(capsys.readouterr().out)  # greetings went elsewhere
    assert {name for _, name in trackio.runs} == {f"r/{t}" for t in [*TRIALS, "means"]}
    found = trackio.runs["guywire", "r/l2-seed0"]
    assert found["group"] == "r"
    assert found["config"]["l2.strength"] == 0.5
    assert found["config"]["epochs"] == 1
    wanted = points(copied, "l2-seed0", "loss", -1)
    assert [(s, row["loss"]) for s, row in sorted(found["rows"].items()) if "loss" in row] == wanted
    assert expected(copied, "l2-seed0").items() <= found["rows"][wanted[-1][0]].items()


def mlflow_client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
def test_mlflow_has_a_parent_and_a_run_a_trial(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = ["compare", "--resume", "--out", str(copied), "--track", "mlflow"]
    for _ in range(2):  # the second time there is nothing new
        assert main(words) == 0
        client = mlflow_client(f"sqlite:///{copied / 'mlflow' / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("guywire")
        runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
        assert len(client.search_runs([experiment.experiment_id])) == 5
        assert set(runs) == {"r", *TRIALS}
        parent = runs.pop("r")
        assert parent.data.params["stream.data"] == "digits"
        assert {p.path for p in client.list_artifacts(parent.info.run_id)} == {
            "report.html",
            "results.parquet",
            "config.toml",
        }
        fetched = client.download_artifacts(parent.info.run_id, "report.html", str(tmp_path))
        assert Path(fetched).read_bytes() == (copied / "report.html").read_bytes()
        for name, run in runs.items():
            assert run.info.status == "FINISHED"
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
            assert expected(copied, name).items() <= run.data.metrics.items()
            for curve, metric, evaluated in (
                ("loss", "loss", -1),
                ("accuracy/task-0", "accuracy", 0),
            ):
                history = client.get_metric_history(run.info.run_id, curve)
                wanted = points(copied, name, metric, evaluated)
                assert sorted((m.step, m.value) for m in history) == wanted
        assert runs["l2-seed1"].data.params["l2.strength"] == "0.5"
        result = json.loads((copied / "trials/l2-seed0/result.json").read_text())
        assert parent.data.metrics["l2/accuracy"] == pytest.approx(
            (result["metrics"]["accuracy"] + expected(copied, "l2-seed1")["final/accuracy"]) / 2
        )
        assert parent.info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_mends_what_a_kill_left_and_minds_the_environment(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = f"sqlite:///{tmp_path / 'server.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "forgetting")
    words = ["compare", "--resume", "--out", str(copied), "--track", "mlflow"]
    client = mlflow_client(uri)
    # The server is the user's: artifacts go where it says, here into the temporary folder.
    number = client.create_experiment("forgetting", (tmp_path / "artifacts").as_uri())
    assert main(words) == 0
    assert not (copied / "mlflow").exists()
    half = next(r for r in client.search_runs([number]) if r.info.run_name == "l2-seed1")
    client.update_run(half.info.run_id, status="RUNNING")
    ledger = json.loads((copied / "tracking.json").read_text())
    ledger["told"]["mlflow"] = []  # as if killed before it was written down
    (copied / "tracking.json").write_text(json.dumps(ledger))
    assert main(words) == 0
    runs = client.search_runs([number])
    assert sorted(r.info.run_name for r in runs) == sorted(["r", *TRIALS])
    again = next(r for r in runs if r.info.run_name == "l2-seed1")
    assert again.info.run_id != half.info.run_id
    assert again.info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_server_that_is_down_costs_nothing_but_a_warning(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    words = ["compare", "--resume", "--out", str(copied), "--track", "mlflow"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.err.count("tracking by mlflow stopped") == 1
    assert "report  " in shown.out
