from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

import guywire
from guywire import cli
from guywire.cli import console, main
from guywire.lab.training.parts import PARTS

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


def compare(*words: str) -> int:
    return main(["compare", *TINY, *words])


def test_the_table_says_how_many_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--methods", "finetune,l2", "--out", str(tmp_path / "r")) == 0
    shown = capsys.readouterr()
    assert "over 2 seeds" in shown.out
    for heading in ("accuracy", "forgetting", "backward", "min-ACC", "WC-ACC", "seconds", "extra"):
        assert heading in shown.out
    assert re.search(r"l2 .* \d+\.\d .*\n.* \[-?\d+\.\d, \d+\.\d\]", shown.out)
    assert "4/4" in shown.err
    assert (tmp_path / "r" / "report.html").is_file()


def test_json_is_one_document_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare("--methods", "finetune,l2", "--out", str(tmp_path / "r"), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["run"] == str(tmp_path / "r")
    assert Path(document["report"]).is_file()
    first = document["results"][0]
    assert (first["method"], first["seeds"]) == ("finetune", 2)
    assert set(first["accuracy"]) == {"mean", "low", "high"}
    assert 0 <= first["accuracy"]["mean"] <= 1


def test_flags_override_the_file_and_the_file_the_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my.toml"
    file.write_text(
        "epochs = 5\nlr = 0.25\nmethods = ['l2', 'ewc']\nseeds = 1\nworkers = 0\n"
        "[stream]\ntasks = 2\nmax_per_class = 20\n[options.l2]\nstrength = 0.5\n"
    )
    out = tmp_path / "r"
    words = ["--epochs", "1", "--methods", "l2", "--option", "l2.anchor=initial", "--out", str(out)]
    assert main(["compare", str(file), *words]) == 0
    from guywire.lab.training.tables import read_toml

    stored = read_toml(out / "config.toml")
    assert (stored["epochs"], stored["lr"], stored["batch_size"]) == (1, 0.25, 32)
    assert stored["options"] == {"l2": {"strength": 0.5, "anchor": "initial"}}
    assert stored["stream"]["tasks"] == 2
    assert "1 seed, no interval" in capsys.readouterr().out
    # What was resolved is a config itself, and gives the same run again.
    assert main(["compare", str(out / "config.toml"), "--out", str(tmp_path / "again")]) == 0
    a, b = (
        json.loads((p / "trials" / "l2-seed0" / "result.json").read_text())
        for p in (out, tmp_path / "again")
    )
    assert a["weights_sha256"] == b["weights_sha256"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "ewcc"], "there is no method 'ewcc': did you mean 'ewc'?"),
        (["--methods", ""], "methods = "),
        (["--model", "mpl"], "did you mean 'mlp'?"),
        (
            ["--scenario", "foo"],
            "stream.scenario = 'foo': input should be 'class', 'task' or 'domain'",
        ),
        (["--data", "digitz"], "did you mean 'digits'?"),
        (["--lr", "-1"], "lr = '-1'"),
        (["--lr", "nan"], "lr = 'nan'"),
        (["--epochs", "many"], "epochs = 'many': input should be a valid integer"),
        (["--epochs", "0"], "epochs = '0'"),
        (["--loss", "hinge"], "loss = 'hinge'"),
        (["--option", "ewc"], "--option ewc: write METHOD.OPTION=VALUE"),
        (["--methods", "ewc", "--option", "ewc.strenth=3"], "did you mean 'strength'?"),
        (["--methods", "ewc", "--option", "ewc.strength=hard"], "options.ewc.strength = 'hard'"),
        (["--methods", "l2", "--option", "l2.select=nothing.*"], "'nothing.*'"),
        (["--resume"], "--resume needs the folder"),
        (["nowhere.toml"], "there is no config file nowhere.toml"),
    ],
)
def test_wrong_words_are_one_sentence_and_exit_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare(*words, "--json") == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "--epohcs", "3"], "--epohcs"),
        (["comparr"], "comparr"),
    ],
)
def test_words_that_are_no_flags_exit_2(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("epoch = 3\n", 2, "my.toml: unknown key 'epoch': did you mean 'epochs'?"),
        ("epochs = 'x'\n", 2, "my.toml: epochs = 'x'"),
        ("[stream]\ntask = 3\n", 2, "unknown key 'task' in [stream]: did you mean 'tasks'?"),
        ("epochs = \n", 1, "my.toml is not TOML"),
    ],
)
def test_a_bad_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, code: int, said: str
) -> None:
    file = tmp_path / "my.toml"
    file.write_text(text)
    assert main(["compare", str(file), "--out", str(tmp_path / "r")]) == code
    assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["my.toml"]


def test_a_folder_in_use_is_refused_and_resumed_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "r")]
    assert compare("--methods", "l2", *out) == 0
    assert compare("--methods", "l2", *out) == 2
    assert "is not empty: add --resume" in capsys.readouterr().err
    assert main(["compare", "--resume", *out]) == 0  # the run knows its own settings
    assert main(["compare", "--resume", *out, "--lr", "0.5"]) == 2
    assert "has lr = 0.001, now it is 0.5" in capsys.readouterr().err


def test_a_loss_that_blows_up_exits_1_and_the_rest_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--methods",
        "finetune,ewc",
        "--option",
        "ewc.strength=1e30",
        "--optimizer",
        "sgd",
        "--json",
    ]
    assert compare(*words, "--out", str(tmp_path / "r")) == 1
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert [e["method"] for e in document["results"]] == ["finetune"]
    assert set(document["failed"]) == {"ewc-seed0", "ewc-seed1"}
    assert re.search(r"2 of 4 trials failed, the first: ewc-seed0: .* step \d+", shown.err)
    assert (tmp_path / "r" / "trials" / "ewc-seed0" / "state.safetensors").is_file()


def test_a_damaged_state_is_named_and_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "r")]
    assert compare("--methods", "l2", *out) == 0
    folder = tmp_path / "r" / "trials" / "l2-seed1"
    (folder / "result.json").unlink()
    (folder / "state.safetensors").write_bytes(b"\x80\x04rubbish that is long enough")
    assert main(["compare", "--resume", *out]) == 1
    assert "l2-seed1/state.safetensors" in capsys.readouterr().err
    (folder / "state.safetensors").unlink()
    assert main(["compare", "--resume", *out]) == 0


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, resource.RLIM_INFINITY))\n"
        "from guywire.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ["compare", *TINY, "--methods", "l2", "--out", str(tmp_path / "r")]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("state.safetensors"))


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "guywire.cli", "compare", "--out", str(out), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(out: Path, pattern: str, count: int) -> None:
    end = time.monotonic() + 100
    while len(list(out.glob(pattern))) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.multiprocess
def test_killed_and_interrupted_and_resumed_equals_never_stopped(tmp_path: Path) -> None:
    words = ["--tasks", "3", "--epochs", "12", "--methods", "ewc,replay", "--seeds", "2"]
    file = tmp_path / "often.toml"
    file.write_text("[checkpoint]\nsteps = 3\n")
    out = tmp_path / "stopped"
    killed = start(out, str(file), *words, "--workers", "2")
    wait_for(out, "trials/*/state.safetensors", 1)
    time.sleep(0.3)
    killed.kill()
    killed.communicate()
    assert not list(out.glob("results.parquet"))
    before = len(list(out.glob("trials/*/result.json")))

    interrupted = start(out, "--resume", "--workers", "1")
    wait_for(out, "trials/*/result.json", before + 1)
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate()
    assert interrupted.returncode == 130, err
    assert f"guywire compare --resume --out {out}" in err
    assert "Traceback" not in err
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"

    assert main(["compare", "--resume", "--out", str(out), "--workers", "0"]) == 0
    whole = tmp_path / "whole"
    assert main(["compare", *words, "--workers", "0", "--out", str(whole)]) == 0
    for path in sorted(whole.glob("trials/*")):
        a, b = (
            json.loads((p / "result.json").read_text()) for p in (path, out / "trials" / path.name)
        )
        for result in (a, b):
            for table in (result, result["metrics"], result["evaluation"]):
                for key in ("seconds", "share"):
                    table.pop(key, None)
        assert a == b
    tables: list[Any] = [
        [
            r
            for r in pyarrow.parquet.read_table(p / "results.parquet").to_pylist()
            if r["metric"] != "seconds"
        ]
        for p in (whole, out)
    ]
    assert tables[0] == tables[1]


@pytest.mark.multiprocess
def test_termination_is_told_apart_and_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "r"
    process = start(out, "--tasks", "2", "--epochs", "100000", "--methods", "l2", "--seeds", "1")
    wait_for(out, "trials/*/state.safetensors", 1)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 143
    assert "go on with: guywire compare --resume" in err


def test_methods_are_listed_with_their_papers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in PARTS)
    assert main(["methods", "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)["methods"]
    assert [c["name"] for c in cards] == list(PARTS)


@pytest.mark.parametrize("name", sorted(PARTS))
def test_every_method_has_a_card_whose_options_are_explained(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["methods", name]) == 0
    assert PARTS[name].summary in capsys.readouterr().out.replace("\n", " ")
    assert main(["methods", name, "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    for key, option in card.get("options", {}).items():
        assert option["help"], key
    if PARTS[name].export:
        assert getattr(guywire, card["export"].removeprefix("guywire.")) is PARTS[name].cls


def test_an_unknown_method_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "replai"]) == 2
    assert "did you mean 'replay'?" in capsys.readouterr().err


def test_runs_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out
    assert compare("--methods", "l2", "--out", str(tmp_path / "r")) == 0
    capsys.readouterr()
    assert main(["runs", str(tmp_path)]) == 0
    assert "2/2" in capsys.readouterr().out
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["runs"]
    assert entry["status"] == "done"
    assert Path(entry["report"]).is_file()
    assert main(["runs", str(tmp_path / "nowhere")]) == 2


def test_a_report_is_rendered_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("--methods", "l2", "--out", str(tmp_path / "r")) == 0
    (tmp_path / "r" / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "r"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert Path(document["report"]).read_text().startswith("<!")
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "there is no run" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 1


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("compare", "merge", "methods", "report", "runs"):
        assert name in shown
    assert main(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "guywire compare --data mnist" in shown
    assert "--domain-column" in shown


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == guywire.__version__ + "\n"


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_NEEDED", ("a_package_that_is_not_there",))
    assert main([]) == 1
    assert "pip install 'guywire[cli]'" in capsys.readouterr().err


def test_numbers_read_well() -> None:
    assert console.number({"mean": None, "low": None, "high": None}) == "–"
    assert console.number({"mean": -1e-9, "low": None, "high": None}) == "0.0"
    assert console.number({"mean": 0.5, "low": 0.25, "high": 0.75}, 100) == "50.0 [25.0, 75.0]"
