from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guywire.cli import main


def write(folder: Path, seed: int, rows: int = 24, size: float = 0.1) -> Path:
    folder.mkdir()
    tensors = {
        "layers.0.weight": torch.randn(rows, 512, generator=torch.Generator().manual_seed(0)),
        "layers.0.bias": torch.randn(rows, generator=torch.Generator().manual_seed(1)),
    }
    g = torch.Generator().manual_seed(seed)
    tensors = {
        n: v + size * bool(seed) * torch.randn(v.shape, generator=g) for n, v in tensors.items()
    }
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def family(tmp_path: Path) -> list[str]:
    return [str(write(tmp_path / name, i)) for i, name in enumerate(("base", "law", "code"))]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_merge_says_what_it_did(
    tmp_path: Path, family: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["merge", *family, "--method", "dare-ties", "--weights", "0.6,0.4", "--out", str(out)]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert f"model in {out}: dare-ties at 0.9" in shown.out
    assert "2 tensors pruned" in shown.out
    assert "writing" in shown.err
    recipe = json.loads((out / "guywire-merge.json").read_text())
    assert recipe["weights"] == [0.6, 0.4]
    assert sorted(load_file(str(out / "model.safetensors"))) == ["layers.0.bias", "layers.0.weight"]


def test_json_is_one_document(
    tmp_path: Path, family: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["merge", *family[:2], "--method", "darex-q", "--q", "0.5", "--out", str(out), "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["out"] == str(out)
    assert document["recipe"]["q"] == {"chosen": "given", "max": 0.5, "mean": 0.5, "min": 0.5}
    assert document["tensors"]["pruned"] == 2
    assert document["bytes"] == (out / "model.safetensors").stat().st_size


def test_a_delta_and_back(tmp_path: Path, family: list[str]) -> None:
    how = ["--rate", "0.99", "--seed", "7"]
    full, delta = str(tmp_path / "full"), str(tmp_path / "delta")
    assert main(["merge", *family, *how, "--out", full]) == 0
    assert main(["merge", *family, *how, "--out", delta, "--delta-only"]) == 0
    size = (tmp_path / "delta" / "delta.safetensors").stat().st_size
    assert size < (tmp_path / "full" / "model.safetensors").stat().st_size / 10
    again, third = str(tmp_path / "again"), str(tmp_path / "third")
    assert main(["merge", family[0], "--apply", delta, "--out", again]) == 0
    assert main(["merge", "--apply", delta, "--base", family[0], "--out", third]) == 0
    assert contents(Path(again)) == contents(Path(full)) == contents(Path(third))
    assert main(["merge", family[1], "--apply", delta, "--out", str(tmp_path / "no")]) == 1


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["--out", "o"], "name the base and at least one", 2),
        (["{base}", "--out", "o"], "name the base and at least one", 2),
        (["{base}", "{law}"], "add --out FOLDER", 2),
        (["{base}", "{law}", "--out", "o", "--rate", "much"], "--rate 'much': write a number", 2),
        (["{base}", "{law}", "--out", "o", "--seed", "1.5"], "write a whole number", 2),
        (["{base}", "{law}", "--out", "o", "--rate", "1.5"], "the rate is 1.5", 2),
        (["{base}", "{law}", "--out", "o", "--weights", "1,"], "--weights ''", 2),
        (["{base}", "{law}", "--out", "o", "--method", "drae"], "no method 'drae'", 2),
        (["{base}", "{law}", "--out", "o", "--select", "x*"], "nothing is left to prune", 2),
        (["{base}", "{law}", "--out", "{law}", "--force"], "would be overwritten", 2),
        (["{base}", "{law}", "--out", "o", "--force", "--resume"], "give one of them", 2),
        (["{base}", "{law}", "--out", "o", "--apply", "d"], "needs the base and nothing else", 2),
        (["{base}", "--out", "o", "--apply", "nowhere"], "no compressed delta", 1),
        (["{base}", "nowhere", "--out", "o"], "no folder or file", 1),
        (
            ["{base}", "{law}", "--out", "o", "--method", "wanda", "--calibrate", "no.txt"],
            "no.txt",
            1,
        ),
    ],
)
def test_wrong_words_are_one_sentence_and_leave_nothing(
    tmp_path: Path,
    family: list[str],
    words: list[str],
    said: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"base": family[0], "law": family[1]}
    assert main(["merge", *(word.format(**names) for word in words)]) == code
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert not shown.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "code", "law"]


def test_mismatches_are_a_table(
    tmp_path: Path, family: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other", 3, rows=25)
    assert main(["merge", family[0], str(other), "--out", str(tmp_path / "o")]) == 1
    shown = capsys.readouterr().err
    assert "2 tensors of 2 do not match" in shown
    assert re.search(r"layers\.0\.weight +24×512 +25×512", shown)
    assert re.search(r"layers\.0\.bias +24 +25", shown)


def test_what_is_there_stays(
    tmp_path: Path, family: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", *family, "--out", str(tmp_path / "out")]
    assert main(words) == 0
    before = contents(tmp_path / "out")
    assert main([*words, "--seed", "1"]) == 2
    assert "give another --out, or --force" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    assert main([*words, "--seed", "1", "--force"]) == 0
    assert contents(tmp_path / "out") != before


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for piece in ("guywire merge base/ tuned/ --rate 0.9", "--apply", "--calibrate", "A head that"):
        assert piece in shown


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name == "nt", reason="needs POSIX signals")
def test_an_interrupted_command_resumes(tmp_path: Path) -> None:
    names = [
        str(write(tmp_path / n, i, rows=16_000)) for i, n in enumerate(("base", "law", "code"))
    ]
    out = tmp_path / "out"
    words = [
        sys.executable,
        "-m",
        "guywire.cli",
        "merge",
        *names,
        "--out",
        str(out),
        "--threads",
        "1",
    ]
    words += ["--method", "ties"]
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / ".out.guywire-merge" / "journal"
    end = time.monotonic() + 60
    while time.monotonic() < end and running.poll() is None:
        if journal.is_file() and len(journal.read_text().splitlines()) > 2:
            running.send_signal(signal.SIGINT)
            break
        time.sleep(0.005)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "Traceback" not in said
    assert not out.exists()
    done = subprocess.run(
        [*words, "--resume", "--json"], check=True, capture_output=True, timeout=100
    )
    assert json.loads(done.stdout)["reused"] > 0
    assert main(["merge", *names, "--out", str(tmp_path / "fresh"), "--method", "ties"]) == 0
    assert contents(out) == contents(tmp_path / "fresh")
