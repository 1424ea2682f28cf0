"""q by gradient on small language models: it helps, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch

import guywire as gw
from guywire.core.errors import UsageError
from guywire.methods.merging import learn_q, top_logits_change

transformers = pytest.importorskip("transformers")

RATE = 0.95


def model_of(kind):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0,
            )  # fmt: skip
            return transformers.GPT2LMHeadModel(config)
        config = transformers.LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)


def texts(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(40, (8, 12), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_learnt_factors_change_the_teachers_logits_less_than_dare(kind):
    model = model_of(kind)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    tuned = {
        n: p + 0.02 * torch.randn(p.shape, generator=generator) * (p.dim() > 1)
        for n, p in base.items()
    }
    model.load_state_dict(tuned, strict=False)
    model.train()
    model.requires_grad_(True)
    next(model.parameters()).requires_grad_(False)
    random = torch.get_rng_state()
    qs = learn_q(model, base, tuned, RATE, texts(2, 4), texts(3, 1), steps=120, lr=3e-2)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, tuned[n]) for n, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(("mlp" in n or "attn" in n) for n in qs)
    assert all(1 - RATE < q <= 1 for q in qs.values())
    if kind == "gpt2":
        name = "transformer.h.0.mlp.c_fc"
        assert qs[f"{name}.bias"] == qs[f"{name}.weight"]

    score = top_logits_change(model.eval(), texts(4, 1))
    changes = []
    for q in (qs, None):
        edited = gw.drop_and_rescale(base, tuned, RATE, q, select=list(qs))
        model.load_state_dict(edited, strict=False)
        with torch.no_grad():
            changes.append(score(model))
    assert changes[0] < 0.7 * changes[1]


def test_what_cannot_be_is_refused():
    model = model_of("llama")
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(UsageError, match="at least one batch to learn on"):
        learn_q(model, params, params, 0.9, [], texts(0, 1))
    with pytest.raises(UsageError, match="none of the 1 pruned tensors"):
        learn_q(model, params, params, 0.9, texts(0, 1), texts(0, 1), select="*embed_tokens*")
