"""E[G G'] of per-sample gradients against the definition, one sample at a time."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guywire as gw
from guywire.core.errors import DataError, SelectionError, UsageError
from guywire.curvature import output_gram
from guywire.curvature import output_gram as gram

tr = pytest.importorskip("transformers")


def brute(model, batches, names, *, causal=False, token=False, turned=()):
    """The definition: autograd on one sample (or one target) at a time, float64 sums."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    params = {name: dict(model.named_parameters())[name].requires_grad_() for name in names}
    totals, count = {}, 0
    for batch in batches:
        pair = not isinstance(batch, dict)
        labels = batch[1] if pair else batch["labels"]
        for i in range(len(labels)):
            if pair:
                logits = model(batch[0][i : i + 1])
            else:
                one = {k: v[i : i + 1] for k, v in batch.items() if k != "labels"}
                logits = model(**one).logits
            y = labels[i : i + 1]
            if causal:
                logits, y = logits[:, :-1], y[:, 1:]
            losses = F.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), y.reshape(-1), reduction="none"
            )[y.reshape(-1) != -100]
            for loss in losses if token else [losses.sum()] if len(losses) else []:
                count += 1
                grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
                for name, g in zip(params, grads, strict=True):
                    g = g.double().T if name in turned else g.double()
                    totals[name] = totals.get(name, 0.0) + g @ g.T
    return {name: total / count for name, total in totals.items()}


def assert_near(found, wanted, rtol=2e-5):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert float((value.double() - wanted[name]).norm()) <= rtol * float(wanted[name].norm())
        assert torch.equal(value, value.T)


def text(n=5, t=6, vocab=40):
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(3, vocab, (n, t), generator=g)
    mask = torch.ones(n, t, dtype=torch.long)
    mask[0, 3:] = 0
    mask[2, 2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100  # as where only the answer counts: sample 2 has no target left
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gpt2():
    torch.manual_seed(0)
    config = tr.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    return tr.GPT2LMHeadModel(config)


def llama():
    torch.manual_seed(0)
    config = tr.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24,
    )  # fmt: skip
    return tr.LlamaForCausalLM(config)


class Twice(nn.Module):
    """One layer at two places: a sample's gradient is the sum of both uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.shared(self.shared(x).tanh()).tanh())


class Tagger(nn.Module):
    """Attention whose projections are one weight: logits [B, T, 3]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 4)
        self.mix = nn.MultiheadAttention(4, 1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        z = self.embed(ids)
        return self.head(z + self.mix(z, 2 * z, z, need_weights=False)[0])


def test_check_7_a_softmax_layer_has_a_closed_form():
    """G = (pi - e_y) x', so F = mean |x|^2 (pi - e_y)(pi - e_y)', with (1, 1, 1) in its null space."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=g, dtype=torch.float64)
    y = torch.randint(3, (40,), generator=g)
    model = nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 5, generator=g))
    found = gram(model, [(x[:7], y[:7]), (x[7:], y[7:])])["weight"]
    residual = (x @ model.weight.detach().T).softmax(1) - F.one_hot(y, 3)
    wanted = torch.einsum("ni,nj,n->ij", residual, residual, x.square().sum(1)) / 40
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    values, vectors = torch.linalg.eigh(found)
    assert abs(float(values[0])) < 1e-12
    torch.testing.assert_close(vectors[:, 0].abs(), torch.full((3,), 3**-0.5).double())
    # The gradient of the batch's mean is another matrix altogether.
    mean = residual.T @ x / 40
    assert float((mean @ mean.T - wanted).norm()) > 0.5 * float(wanted.norm())


@pytest.mark.parametrize("token", [False, True])
def test_gpt2_whose_weights_are_turned(token):
    model, batch = gpt2(), text()
    names = [
        f"transformer.h.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    found = gram(model, [batch], select="*.h.*", unit="token" if token else "sample")
    assert_near(found, brute(model, [batch], names, causal=True, token=token, turned=names))
    assert found["transformer.h.0.attn.c_attn.weight"].shape == (48, 48)


def test_llama_with_frozen_weights_and_other_batch_sizes():
    model, batch = llama().requires_grad_(False), text()
    names = [n for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
    parts = [{k: v[lo:hi] for k, v in batch.items()} for lo, hi in ((0, 1), (1, 5))]
    found = gram(model, parts, select="*.layers.*")
    assert_near(found, brute(model, [batch], names, causal=True))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("build", [Twice, Tagger])
def test_weights_that_are_used_more_than_once(build):
    model = build()
    g = torch.Generator().manual_seed(1)
    if build is Tagger:
        batch = torch.randint(9, (6, 4), generator=g), torch.randint(3, (6, 4), generator=g)
    else:
        batch = torch.randn(6, 5, generator=g), torch.randint(3, (6,), generator=g)
    found = gram(model, [batch])
    names = [n for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    assert_near(found, brute(model, [batch], names))


def test_more_positions_than_inputs():
    """Where a gradient is smaller than the products of positions, it is formed."""
    g = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    batch = torch.randn(5, 11, 3, generator=g), torch.randint(4, (5, 11), generator=g)
    assert_near(gram(model, [batch]), brute(model, [batch], ["weight"]))


def test_the_layer_under_an_adapter():
    peft = pytest.importorskip("peft")
    model, batch = llama(), text()
    plain = gram(model, [batch], select="*q_proj*")
    dressed = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], r=2), model)
    found = gram(dressed, [batch], select="*q_proj.base_layer*")
    for a, b in zip(plain.values(), found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_a_layer_without_a_rule():
    class Odd(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias) * 2.0

    torch.manual_seed(0)
    model = nn.Sequential(Odd(5, 4), nn.Tanh(), nn.Linear(4, 3))
    g = torch.Generator().manual_seed(1)
    batch = torch.randn(6, 5, generator=g), torch.randint(3, (6,), generator=g)
    assert_near(gram(model, [batch]), brute(model, [batch], ["0.weight", "2.weight"]))


def test_expected_labels_are_the_mean_over_the_models_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = model(x).softmax(1).detach()
    wanted = {"0.weight": 0.0, "2.weight": 0.0}
    for i in range(6):
        for c in range(3):
            one = brute(model, [(x[i : i + 1], torch.tensor([c]))], list(wanted))
            for name, value in one.items():
                wanted[name] = wanted[name] + p[i, c] * value / 6
    assert_near(gram(model, [(x, torch.zeros(6, dtype=torch.long))], labels="expected"), wanted)


@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, 9)))
def test_batch_size_changes_nothing(cuts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    g = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(10, 4, generator=g, dtype=torch.float64),
        torch.randint(3, (10,), generator=g),
    )
    edges = [0, *sorted(cuts), 10]
    parts = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(edges)]
    assert_near(gram(model, parts), gram(model, [(x, y)]), rtol=1e-12)


def test_the_diagonal_is_that_of_the_summed_diagonal_fisher():
    """F_ii = E sum_j G_ij^2: the diagonal Fisher information summed over inputs."""
    model, batch = llama(), text()
    squares = gw.curvature.diagonal_fisher(model, [batch], labels="true", select=["*_proj.weight"])
    for name, value in gram(model, [batch], select="*_proj.weight").items():
        torch.testing.assert_close(value.diagonal(), squares[name].sum(1), rtol=1e-4, atol=1e-9)


def test_bfloat16_is_summed_in_float32():
    model, batch = llama().to(torch.bfloat16), text()
    found = gram(model, [batch], select="*q_proj*")
    assert all(f.dtype == torch.float32 and bool(f.isfinite().all()) for f in found.values())


def test_flags_gradients_and_modes_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    model[0].bias.requires_grad_(False)
    before = torch.get_rng_state()
    x = torch.ones(4, 4)
    first = gram(model, [(x, torch.tensor([0, 1, 2, 0]))])
    assert torch.equal(
        first["0.weight"], gram(model, [(x, torch.tensor([0, 1, 2, 0]))])["0.weight"]
    )
    assert model.training
    assert model[0].weight.grad is None
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(4, 3))
    batch = torch.tensor([[1], [2]]), torch.tensor([0, 1])
    with pytest.raises(SelectionError, match="no weight of a linear layer"):
        output_gram(model, [batch], select="0.*")
    with pytest.raises(UsageError, match="labels='given'"):
        output_gram(model, [batch], labels="given")
    with pytest.raises(DataError, match="no data"):
        output_gram(model, [])
    with pytest.raises(DataError, match="no target"):
        output_gram(model, [(batch[0], torch.tensor([-100, -100]))])
