"""The torchrun example on two gloo processes: it tunes, saves, resumes on one, and what it saves loads."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_fsdp2.py"
SMALL = ["--length", "16", "--batch-size", "8", "--fisher-blocks", "8", "--lr", "1e-2"]
OLD = [f"the {a} mast is held by a {b} wire" for a in ("tall", "old", "free") for b in "abcdefgh"]
NEW = [f"a {a} ship sails on the {b} sea" for a in ("small", "grey", "new") for b in "abcdefgh"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, its tokenizer, and two files of text."""
    import tokenizers
    import transformers
    from tokenizers import models, pre_tokenizers, trainers

    home = tmp_path_factory.mktemp("example")
    (home / "old.txt").write_text("\n".join(OLD * 4))
    (home / "new.jsonl").write_text("\n".join(f'{{"text": "{t}"}}' for t in NEW * 4))
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(OLD + NEW, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(home / "tiny")
    config = transformers.LlamaConfig(
        vocab_size=len(fast), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(home / "tiny")
    return home


def torchrun(folder: Path, processes: int, *words: str) -> str:
    """Run the example; return what it printed."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(SCRIPT), "tiny", *SMALL, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def losses(said: str, when: str) -> dict[str, float]:
    line = next(line for line in said.splitlines() if line.startswith(f"{when}:"))
    return {name: float(value) for name, value in re.findall(r"(\w+) loss ([\d.]+)", line)}


def example() -> Any:
    spec = importlib.util.spec_from_file_location("finetune_fsdp2", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(path: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(path / "model.safetensors")


@pytest.mark.multiprocess
def test_two_processes_tune_with_ewc_and_what_they_save_loads(folder: Path) -> None:
    import transformers

    said = torchrun(
        folder, 2, "--train", "new.jsonl", "--old", "old.txt", "--method", "ewc",
        "--strength", "10", "--steps", "4", "--accumulate", "2", "--out", "ewc",
    )  # fmt: skip
    before, after = losses(said, "before"), losses(said, "after")
    assert after["new"] < before["new"]
    penalties = [float(p) for p in re.findall(r"penalty ([\d.e+-]+)", said)]
    assert len(penalties) == 4
    assert min(penalties) > 0.0

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "ewc").eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "ewc")
    for name, file in (("new", "new.jsonl"), ("old", "old.txt")):
        _, held_out = example().blocks(folder / file, tokenizer, 16)
        with torch.no_grad():
            loss = float(model(input_ids=held_out, labels=held_out).loss)
        assert loss == pytest.approx(after[name], abs=2e-4)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("method", ["l2", "ewc"])
def test_a_run_goes_on_with_another_number_of_processes(folder: Path, method: str) -> None:
    words = ["--train", "new.jsonl", "--old", "old.txt", "--method", method, "--steps", "6"]
    words += ["--strength", "10"]
    torchrun(folder, 2, *words, "--out", f"{method}-whole")
    torchrun(folder, 2, *words, "--out", f"{method}-split", "--stop-after", "3")
    assert not (folder / f"{method}-split" / "model.safetensors").exists()
    said = torchrun(folder, 1, *words, "--out", f"{method}-split", "--resume")
    assert "on from step 3 with 1 processes" in said
    whole, split, start = (
        weights(folder / name) for name in (f"{method}-whole", f"{method}-split", "tiny")
    )
    assert whole.keys() == split.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, rtol=0, atol=1e-5)
    assert any((whole[n] - start[n]).abs().max() > 1e-2 for n in start)
    # Without the wires' state it would have gone elsewhere: the pull is strong here.
    torchrun(folder, 1, *words[:4], "--method", "none", "--steps", "6", "--out", f"{method}-free")
    free = weights(folder / f"{method}-free")
    assert any((whole[n] - free[n]).abs().max() > 1e-3 for n in free)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--method", "ewc"], "--method ewc needs --old FILE"),
        (["--train", "nothing.txt"], "there is no file nothing.txt"),
        (["--out", "tiny"], "--out tiny is not empty: add --resume"),
        (["--resume"], "--resume: there is no checkpoint in"),
        (["--batch-size", "8", "--accumulate", "3"], "must be a multiple of processes"),
        (["--steps", "0"], "--steps 0: at least 1"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(
    folder: Path,
    words: list[str],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as left:
        example().main(["tiny", "--train", "new.jsonl", "--out", "fresh", *words])
    assert left.value.code == 2
    assert why in capsys.readouterr().err


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        example().main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "torchrun --standalone --nproc-per-node 2" in shown
    assert "search by decades" in shown
