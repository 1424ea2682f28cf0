"""Hugging Face models from configs, with padding, against a batch-of-one autograd loop."""

from __future__ import annotations

import pytest
import torch

from guywire.curvature import diagonal_fisher

tr = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
N = T = 5
NO_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}


def text(labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 40, (N, T))
    mask = torch.ones(N, T, dtype=torch.long)
    mask[0, 3:] = 0
    mask[2, 2:] = 0
    if labels is None:
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def bert():
    config = tr.BertConfig(vocab_size=40, num_labels=3, **SMALL)
    return tr.BertForSequenceClassification(config), text(torch.randint(3, (N,)))


def bert_tokens():
    return tr.BertForMaskedLM(tr.BertConfig(vocab_size=40, **SMALL)), text()


def vit():
    config = tr.ViTConfig(image_size=16, patch_size=4, num_labels=4, **SMALL)
    batch = {"pixel_values": torch.randn(N, 3, 16, 16), "labels": torch.randint(4, (N,))}
    return tr.ViTForImageClassification(config), batch


def gpt2():
    config = tr.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, **NO_SPECIAL
    )
    return tr.GPT2LMHeadModel(config), text()


def llama():
    config = tr.LlamaConfig(vocab_size=40, num_key_value_heads=1, **SMALL)
    return tr.LlamaForCausalLM(config), text()


def t5():
    config = tr.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return tr.T5ForConditionalGeneration(config), text()


@pytest.mark.parametrize("make", [bert, bert_tokens, vit, gpt2, llama, t5])
def test_models_equal_a_loop_over_samples(make, brute, same) -> None:
    torch.manual_seed(0)
    model, batch = make()
    causal = make in (gpt2, llama)
    expected = brute(model, [batch], causal=causal)
    same(diagonal_fisher(model, [batch], labels="true"), expected)
    parts = [{k: v[i] for k, v in batch.items()} for i in (slice(0, 3), slice(3, N))]
    same(diagonal_fisher(model, parts, labels="true"), expected)


@pytest.mark.parametrize("make", [bert_tokens, gpt2])
@pytest.mark.parametrize("labels", ["true", "sampled"])
def test_padded_equals_single_unpadded_sequences(make, labels, same) -> None:
    """Check 7 of fisher-sequential-transfer; also where padding is labelled with a real token."""
    torch.manual_seed(0)
    model, batch = make()
    batch["labels"] = torch.where(batch["attention_mask"] == 0, 7, batch["labels"])
    lengths = batch["attention_mask"].sum(1).tolist()
    single = [
        {k: v[i : i + 1, :length] for k, v in batch.items()} for i, length in enumerate(lengths)
    ]
    for unit in ("sample", "token"):
        padded = diagonal_fisher(model, [batch], labels=labels, unit=unit)
        same(padded, diagonal_fisher(model, single, labels=labels, unit=unit), 2e-5)


def test_left_padding_predicts_nothing_from_padding(same) -> None:
    torch.manual_seed(0)
    model, batch = gpt2()
    ids = batch["input_ids"][:1]
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    pad = torch.full((1, 2), 3)
    padded = {
        "input_ids": torch.cat([pad, ids], 1),
        "attention_mask": torch.cat([torch.zeros_like(pad), torch.ones_like(ids)], 1),
        "labels": torch.cat([pad, ids], 1),
        "position_ids": torch.tensor([[0, 0, *range(T)]]),
    }
    found = diagonal_fisher(model, [padded], labels="true")
    expected = diagonal_fisher(model, [plain], labels="true")
    same(found, expected, 2e-5)
