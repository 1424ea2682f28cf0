"""Tiny transformers of several families, for the tests of this folder."""

from __future__ import annotations

import logging

import torch
from torch import nn

KINDS = (
    "llama", "llama-gqa", "gpt2", "bert", "vit", "t5", "distilbert", "mixtral", "phi3", "bart",
    "torch",
)  # fmt: skip


def tiny(kind: str, layers: int = 2, seed: int = 0) -> nn.Module:
    """Return a small model of a family; all have 8 attention heads' worth of nothing to download."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if kind == "torch":
            layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
            return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        import transformers as t

        logging.getLogger("transformers").setLevel(logging.ERROR)
        wide = {
            "hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2,
            "intermediate_size": 24,
        }  # fmt: skip
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        if kind in ("llama", "llama-gqa"):
            heads = 2 if kind == "llama" else 1
            return t.LlamaForCausalLM(
                t.LlamaConfig(vocab_size=50, num_key_value_heads=heads, **ends, **wide)
            )
        if kind == "gpt2":
            return t.GPT2LMHeadModel(
                t.GPT2Config(
                    vocab_size=50, n_embd=16, n_layer=layers, n_head=2, n_positions=16,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ends,
                )
            )  # fmt: skip
        if kind == "bert":
            config = t.BertConfig(
                vocab_size=50, max_position_embeddings=16, num_labels=3, **wide, **still
            )
            return t.BertForSequenceClassification(config)
        if kind == "vit":
            config = t.ViTConfig(image_size=8, patch_size=4, num_labels=3, **wide, **still)
            return t.ViTForImageClassification(config)
        if kind == "t5":
            return t.T5ForConditionalGeneration(
                t.T5Config(
                    vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=layers, num_heads=2,
                    dropout_rate=0.0, decoder_start_token_id=0, **{**ends, "bos_token_id": None},
                )
            )  # fmt: skip
        if kind == "distilbert":
            return t.DistilBertModel(
                t.DistilBertConfig(vocab_size=50, dim=16, n_layers=layers, n_heads=2, hidden_dim=24)
            )
        if kind == "mixtral":
            return t.MixtralForCausalLM(
                t.MixtralConfig(
                    vocab_size=50, num_key_value_heads=2, num_local_experts=2, **ends, **wide
                )
            )
        if kind == "phi3":
            return t.Phi3ForCausalLM(
                t.Phi3Config(vocab_size=50, num_key_value_heads=1, **ends, **wide)
            )
        if kind == "bart":
            return t.BartModel(
                t.BartConfig(
                    vocab_size=50, d_model=16, encoder_layers=layers, decoder_layers=layers,
                    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
                    decoder_ffn_dim=24, max_position_embeddings=16, **ends,
                )
            )  # fmt: skip
    raise KeyError(kind)


def batch_of(kind, seed, rows=4):
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {
            "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator),
            "labels": torch.randint(3, (rows,), generator=generator),
        }
    ids = torch.randint(3, 50, (rows, 8), generator=generator)
    labels = torch.randint(3, (rows,), generator=generator) if kind == "bert" else ids
    return {"input_ids": ids, "labels": labels}


def train(model, optimizer, kind="llama", steps=4, clip=1.0, first=0, norms=None):
    model.train()
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(**batch_of(kind, step)).loss.backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            if norms is not None:
                norms.append(float(norm))
        optimizer.step()


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def frozen_rows(model, frozen):
    """Yield each frozen tensor or block of the model's parameters now."""
    from guywire.methods.sparsity._pieces import parse

    params = dict(model.named_parameters())
    for name in frozen:
        whole, index = parse(name)
        yield name, params[whole].detach() if index is None else params[whole].detach()[index]
