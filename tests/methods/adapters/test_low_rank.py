"""Factorising models: the best approximation, which layers, families, saving and loading."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import guywire as gw
from guywire.core.errors import AttachError, SelectionError, UsageError
from guywire.methods.adapters.low_rank import LowRank, rank_of, svd_factors

_spec = importlib.util.spec_from_file_location(
    "tiny", Path(__file__).parents[1] / "sparsity" / "tiny.py"
)
tiny_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_models)
tiny = tiny_models.tiny

KINDS = ("llama", "llama-gqa", "gpt2", "bert", "vit", "t5", "distilbert", "phi3", "bart", "torch")


def inputs(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if kind == "torch":
        return {"src": torch.randn(2, 5, 16, generator=generator)}
    ids = torch.randint(3, 50, (2, 6), generator=generator)
    return {"input_ids": ids, "labels": ids} if kind == "t5" else {"input_ids": ids}


def run(model, kind):
    out = model(**inputs(kind))
    if isinstance(out, torch.Tensor):
        return out
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRank)}


def matrix(rows=40, columns=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def test_check_1_eckart_young():
    weight = matrix()
    first, second = svd_factors(weight, 10)
    error = float((weight - second @ first).square().sum())
    tail = torch.linalg.svdvals(weight)[10:].square().sum()
    assert error == pytest.approx(float(tail), abs=1e-9)
    for seed in range(100):
        # A random row space with the best columns for it, which is the hardest rival.
        basis = torch.linalg.qr(matrix(30, 10, seed=seed + 1)).Q
        assert float((weight - weight @ basis @ basis.T).square().sum()) > error


def test_check_2_balanced_factors():
    weight = matrix()
    first, second = svd_factors(weight, 10)
    sigma = torch.diag(torch.linalg.svdvals(weight)[:10])
    torch.testing.assert_close(second.T @ second, sigma, rtol=0, atol=1e-10)
    torch.testing.assert_close(first @ first.T, sigma, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_check_3_full_rank_is_the_original(kind):
    model = tiny(kind).eval()
    full = gw.factorize(model, rank=10_000)
    assert len(layers(full)) >= 4
    torch.testing.assert_close(run(full, kind), run(model, kind), rtol=0, atol=1e-5)
    dense = gw.fold_factors(full)
    assert not layers(dense)
    assert [n for n, _ in dense.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [type(m) for m in dense.modules()] == [type(m) for m in model.modules()]
    for (name, a), (_, b) in zip(dense.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_check_4_weights_of_low_rank_are_kept():
    model = nn.Sequential(nn.Linear(30, 40)).double()
    with torch.no_grad():
        model[0].weight.copy_(matrix(40, 5) @ matrix(5, 30, seed=1))
    small = gw.factorize(model, 2.0)
    assert small[0].first.out_features == rank_of(40, 30, 2.0) == 8
    x = matrix(7, 30, seed=2)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)


def test_check_5_ranks():
    square = [rank_of(768, 768, c) for c in (1.5, 2, 3)]
    wide = [rank_of(3072, 768, c) for c in (1.5, 2, 3)]
    assert square == [256, 192, 128]
    assert wide == [409, 307, 204]
    assert wide == [rank_of(768, 3072, c) for c in (1.5, 2, 3)]
    with pytest.raises(UsageError, match="ratio is 0"):
        rank_of(3, 3, 0)


@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(1.0, 20.0))
@settings(max_examples=300, deadline=None)
def test_check_5_never_more_weights_than_asked_for(out, into, ratio):
    rank = rank_of(out, into, ratio)
    weights = rank * (out + into)
    assert weights <= out * into / ratio * (1 + 1e-9)
    assert weights + out + into > out * into / ratio * (1 - 1e-9)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_check_10_round_trip_of_the_state(kind):
    model = tiny(kind).eval()
    small = gw.factorize(model, 1.5)
    shell = gw.factorize(tiny(kind, seed=1).eval(), 1.5, init="shape")
    assert all(not m.first.weight.any() for m in layers(shell).values())
    shell.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(run(shell, kind), run(small, kind))
    for name, module in layers(small).items():
        own = {n for n in small.state_dict() if n.startswith(f"{name}.")}
        wanted = {f"{name}.0.weight", f"{name}.1.weight"}
        assert own == wanted | ({f"{name}.1.bias"} if module.bias is not None else set())


@pytest.mark.parametrize("kind", KINDS)
def test_check_11_the_rest_and_the_input_are_left_alone(kind):
    model = tiny(kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    types = [type(m) for m in model.modules()]
    small = gw.factorize(model, 1.5)
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    factors = tuple(f"{name}." for name in layers(small))
    rest = {n: p for n, p in small.named_parameters() if not n.startswith(factors)}
    assert rest
    assert all(torch.equal(p, before[n]) for n, p in rest.items())
    assert not {id(p) for p in small.parameters()} & {id(p) for p in model.parameters()}
    for word in ("lm_head", "classifier", "pooler", "embed", "norm"):
        assert not any(word in name for name in layers(small))


def test_tied_weights_stay_tied():
    model = tiny("gpt2")
    small = gw.factorize(model, 1.5, exclude=())
    assert small.lm_head.weight is small.transformer.wte.weight
    one = nn.Linear(20, 20)
    with pytest.raises(SelectionError, match="no linear layer"):
        gw.factorize(nn.Sequential(one, nn.Tanh(), one))


def test_parts_of_multihead_attention_stay():
    encoder = gw.factorize(tiny("torch"), 1.5)
    assert sorted({n.split(".")[-1] for n in layers(encoder)}) == ["linear1", "linear2"]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", ["torch", "t5"])
def test_code_that_reads_the_layers_weight_still_works(kind, mode):
    small = gw.factorize(tiny(kind).train(mode), 1.5)
    with torch.no_grad():
        got = run(small, kind)
        wanted = run(gw.fold_factors(small), kind)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_the_weight_that_others_see_is_the_product():
    pair = gw.factorize(nn.Sequential(nn.Linear(20, 30)).double(), 1.5)[0]
    x = matrix(4, 20)
    assert pair.weight.shape == (30, 20)
    assert pair.weight.dtype == torch.float64
    assert (pair.in_features, pair.out_features) == (20, 30)
    out = nn.functional.linear(x, pair.weight, pair.bias)
    torch.testing.assert_close(out, pair(x))
    torch.testing.assert_close(x @ pair.weight.T + pair.bias, pair(x))
    out.sum().backward()  # differentiable
    assert pair.first.weight.grad is not None
    turned = gw.factorize(tiny("gpt2"), 1.5).transformer.h[0].mlp.c_fc
    assert turned.weight.shape == (16, 64)


def test_flags_types_and_modes_are_kept():
    model = nn.Sequential(nn.Linear(30, 40), nn.Dropout(), nn.Linear(40, 30)).bfloat16().eval()
    model[0].requires_grad_(False)
    small = gw.factorize(model, 2.0)
    assert all(p.dtype == torch.bfloat16 for p in small.parameters())
    assert not small[0].first.weight.requires_grad
    assert small[2].first.weight.requires_grad
    assert not any(m.training for m in small.modules())
    again = gw.factorize(nn.Sequential(small, nn.Linear(30, 30)), 2.0)
    assert len(layers(again)) == 3  # factors are not factorised once more


def test_random_factors_are_seeded_and_of_the_layers_scale():
    model = nn.Sequential(nn.Linear(400, 300))
    before = torch.get_rng_state()
    one, two = (gw.factorize(model, 2.0, init="random", seed=3) for _ in range(2))
    gw.fold_factors(gw.factorize(tiny("gpt2"), 2.0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[0].first.weight, two[0].first.weight)
    x = torch.randn(64, 400)
    assert 0.7 < float((one(x) - one[0].bias).detach().std()) < 1.4


def test_macs_fall_by_the_ratio():
    wide = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))

    def macs(m, x):
        with FlopCounterMode(display=False) as counter:
            m(x)
        return counter.get_total_flops()

    x = torch.randn(8, 256)
    ratio = macs(gw.factorize(wide, 3.0), x) / macs(wide, x)
    assert 0.32 < ratio <= 1 / 3


def test_senseless_arguments():
    model = nn.Sequential(nn.Linear(30, 40))
    for words in ({"ratio": -1.0}, {"init": "zeros"}, {"rank": 0}):
        with pytest.raises(UsageError):
            gw.factorize(model, **words)
    with pytest.raises(SelectionError, match="no linear layer"):
        gw.factorize(model, exclude=["0"])
    with pytest.raises(SelectionError, match="no linear layer"):
        gw.factorize(nn.Sequential(nn.Linear(30, 3)))
    with pytest.raises(SelectionError, match="nothing to fold"):
        gw.fold_factors(model)
    model.odd = torch.ones(1, requires_grad=True) * 2
    with pytest.raises(AttachError, match="cannot be copied"):
        gw.factorize(model)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "vit"])
def test_a_saved_folder_loads_again(kind, tmp_path):
    from safetensors.torch import load_file, load_model

    model = tiny(kind).eval()
    small = gw.factorize(model, 1.5)
    # Else transformers saves some architectures (ViT) under the names that they had long ago.
    small.save_pretrained(tmp_path, save_original_format=False)
    config = type(model.config).from_pretrained(tmp_path)
    shell = gw.factorize(type(model)(config).eval(), 1.5, init="shape")
    # load_model minds tied weights, which a file holds once.
    load_model(shell, str(tmp_path / "model.safetensors"))
    assert torch.equal(run(shell, kind), run(small, kind))
    if kind not in ("gpt2", "t5"):
        shell.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    # Folded, the folder is a plain one.
    gw.fold_factors(small).save_pretrained(tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(run(dense, kind), run(small, kind), rtol=0, atol=1e-5)
