"""Drawing halves: the sheet's counts, families of transformers, and resetting to the base."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guywire as gw
from guywire.core.errors import SelectionError, UsageError
from guywire.methods.sparsity import _pieces
from guywire.methods.sparsity.halves import draw

transformers = pytest.importorskip("transformers")

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_models)
tiny, KINDS = tiny_models.tiny, tiny_models.KINDS


def seven_b(layers=32):
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                num_hidden_layers=layers, num_attention_heads=32, tie_word_embeddings=False,
            )
        )  # fmt: skip


def test_check_1_counts_of_llama_2_7b():
    model = seven_b()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    names = gw.half(model, seed=5)
    assert sum(sizes.values()) == 6_738_415_616
    assert sum(sizes[name] for name in names) == 3_500_281_856
    fractions = gw.half_fractions(model, names)
    assert fractions["model"] == pytest.approx(0.5195, abs=5e-5)
    assert fractions["layers"] == fractions["attention"] == fractions["norm"] == 0.5
    assert fractions["feed-forward"] == 0.5


@pytest.mark.parametrize("layers", [2, 3, 6, 32])
def test_check_2_counts_per_layer(layers):
    names = set(gw.half(tiny("llama", layers), seed=layers))
    twice = 0
    for i in range(layers):
        own = {n.removeprefix(f"model.layers.{i}.") for n in names if f".layers.{i}." in n}
        assert sum(n.startswith("self_attn.") for n in own) == 2
        assert sum("layernorm" in n for n in own) == 1
        mlp = sum(n.startswith("mlp.") for n in own)
        assert mlp in (1, 2)
        twice += mlp == 2
    assert layers - twice == layers // 2  # floor(L/2) layers freeze two
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names


def test_check_2_every_matrix_is_updated_half_of_the_time():
    # With two layers the sheet's 0.03 is 2.7 standard deviations of 18 frequencies; with 32 layers
    # some of 288 would lie outside of it by chance.
    pieces = _pieces.pieces_of(tiny("llama", 2))
    seen = Counter(
        piece for seed in range(2000) for piece in draw(pieces, seed, 0, "category", 0.5, 0)
    )
    assert len(pieces) == 18
    assert all(abs(seen[piece] / 2000 - 0.5) < 0.03 for piece in pieces)


def test_layers_draw_independently():
    pieces = _pieces.pieces_of(tiny("llama", 2))
    queries = [p for p in pieces if "q_proj" in p.names[0]]
    drawn = [draw(pieces, seed, 0, "category", 0.5, 0) for seed in range(1000)]
    both = sum(queries[0] in d and queries[1] in d for d in drawn)
    assert abs(both / 1000 - 0.25) < 0.05


def test_level_layer_takes_whole_layers():
    names = gw.half(tiny("llama", 6), seed=1, level="layer")
    counted = Counter(n.split(".")[2] for n in names if ".layers." in n)
    assert sorted(counted.values()) == [9, 9, 9]


def test_level_model_takes_any_matrices():
    model = tiny("llama", 6)
    counts = set()
    for seed in range(4):
        inside = [n for n in gw.half(model, seed=seed, level="model") if ".layers." in n]
        assert sum("norm" in n for n in inside) == 6
        assert sum("norm" not in n for n in inside) == 21
        counts.add(tuple(sorted(Counter(n.split(".")[2] for n in inside).values())))
    assert len(counts) > 1  # layers are not balanced


@given(st.floats(0, 1), st.integers(1, 9), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_any_ratio_is_balanced(ratio, total, layers):
    counts = _pieces.counts(total, layers, ratio)
    assert len(counts) == layers
    assert max(counts) - min(counts) <= 1
    assert min(counts) >= 0
    assert max(counts) <= total
    assert abs(sum(counts) - ratio * total * layers) <= 0.5 + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_families_are_recognised(kind):
    model = tiny(kind)
    pieces = _pieces.pieces_of(model)
    kinds = Counter((p.layer, p.unit, p.category) for p in pieces)
    for (_, _, category), count in kinds.items():
        if category == "attention":
            assert count == 4  # query, key, value and output, fused or not
    names = gw.half(model, seed=3)
    fractions = gw.half_fractions(model, names)
    assert {"attention", "feed-forward", "norm", "layers", "model"} == fractions.keys()
    assert 0.3 < fractions["layers"] < 0.7
    # What is in no piece is updated: no embedding and no head is frozen.
    inside = {_pieces.parse(n)[0] for p in pieces for n in p.names}
    outside = {n for n, _ in model.named_parameters()} - inside
    assert outside <= set(names)
    for word in ("embed", "lm_head", "classifier", "wte", "wpe", "shared"):
        assert all(word not in name for name in inside)
    # All of a layer is in a piece, but for embeddings and routers.
    left = {n for n in outside if any(n.startswith(f"{p.layer}.") for p in pieces)}
    assert all(n.endswith(("relative_attention_bias.weight", "mlp.gate.weight")) for n in left)


def test_names_of_wrapped_models_are_canonical():
    model = tiny("torch")
    wrapped = torch.compile(model, backend="eager")
    assert gw.half(wrapped, seed=2) == gw.half(model, seed=2)


def test_gpt2_is_halved_by_blocks_of_columns():
    model = tiny("gpt2")
    pieces = {p.names for p in _pieces.pieces_of(model) if p.layer.endswith("h.0")}
    stem = "transformer.h.0.attn.c_attn"
    for a, b in ((0, 16), (16, 32), (32, 48)):
        assert (f"{stem}.weight[:, {a}:{b}]", f"{stem}.bias[{a}:{b}]") in pieces
    # Where all blocks are updated the parameter goes by its own name.
    assert f"{stem}.weight" in gw.half(model, ratio=1.0)


def test_grouped_queries_are_logged_as_they_are():
    model = tiny("llama-gqa")
    found = {gw.half_fractions(model, gw.half(model, seed=s))["attention"] for s in range(12)}
    assert len(found) > 1  # two of four matrices, but not half of the parameters


def test_fused_projections_with_an_order_of_their_own_are_an_error_with_a_way_out():
    with torch.device("meta"):
        model = transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(
                vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=24, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    with pytest.raises(SelectionError, match=r"query_key_value\.weight.*categories="):
        gw.half(model)
    names = gw.half(model, categories={"*.query_key_value.*": "attention"})
    attention = [n for n in names if "attention" in n and n.endswith("weight") and "norm" not in n]
    assert len(attention) == 2  # of the fused matrix and the output's, one a layer


def test_models_without_layers_are_an_error_with_a_way_out():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(SelectionError, match=r"no transformer layers.*0\.weight"):
        gw.half(model)
    names = gw.half(model, categories={"3.*": "always", "*": "feed-forward"})
    assert {"3.weight", "3.bias"} <= set(names)
    assert len(names) == 6  # two of the other three: an odd half is rounded up
    with pytest.raises(UsageError, match="'mlp'"):
        gw.half(model, categories={"*": "mlp"})
    with pytest.raises(UsageError, match="'body'"):
        gw.half(model, categories={"body": "norm"})


def test_an_unknown_parameter_in_a_layer_is_an_error():
    model = tiny("torch")
    model.layers[0].gain = nn.Parameter(torch.ones(16))
    with pytest.raises(SelectionError, match=r"1 parameters.*layers\.0\.gain"):
        gw.half(model)
    assert "layers.0.gain" in gw.half(model, categories={"*.gain": "always"})


@pytest.mark.parametrize("name", ["vit", "minilm"])
def test_the_labs_classifiers(name, request):
    from guywire.lab.models.classifier import Classifier
    from guywire.lab.models.huggingface import Encoder

    inner = tiny("vit").vit if name == "vit" else tiny("bert").bert
    model = Classifier(Encoder(inner, "image" if name == "vit" else "text", 16), 16)
    model.grow(3, torch.Generator().manual_seed(0))
    names = gw.half(model)
    assert {"head.blocks.0.weight", "head.blocks.0.bias"} <= set(names)
    assert gw.half_fractions(model, names)["attention"] == 0.5


def test_tied_embeddings_count_once_and_are_updated():
    model = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    names = gw.half(model)
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_check_8_rounds_differ_and_the_same_round_is_the_same():
    model, again = tiny("llama", seed=0), tiny("llama", seed=1)
    halves = [tuple(gw.half(model, 7, r)) for r in range(6)]
    assert len(set(halves)) == 6
    assert [tuple(gw.half(again, 7, r)) for r in range(6)] == halves
    assert gw.half(model, 7, 0, epoch=1) != gw.half(model, 7, 0)
    assert halves[0] != tuple(gw.half(model, 8, 0))
    # Known by heart, so that a later version of anything cannot draw otherwise unnoticed.
    first = [n.split(".", 3)[3] for n in halves[0] if n.startswith("model.layers.0")]
    assert first == KNOWN


KNOWN = [
    "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
]


@pytest.mark.parametrize("words", [{"ratio": 1.5}, {"level": "block"}, {"seed": -1}])
def test_senseless_arguments(words):
    with pytest.raises(UsageError):
        gw.half(tiny("torch"), **words)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_check_7_half_reset(kind):
    base, tuned = tiny(kind, seed=0), tiny(kind, seed=1)
    start, end = (dict(m.named_parameters()) for m in (base, tuned))
    names = gw.half(base, seed=4)
    pieces = _pieces.pieces_of(base)
    everything = [n for p in pieces for n in p.names]
    drawn = draw(pieces, 4, 0, "category", 0.5, 0)
    rest = [n for p in pieces if p not in drawn for n in p.names]
    whole = gw.half(base, ratio=1.0)
    for mask, wanted in ((whole, end), ([], start)):
        for name, value in gw.half_reset(end, start, mask).items():
            assert torch.equal(value, wanted[name])
    once = gw.half_reset(end, start, names)
    twice = gw.half_reset(once, start, rest)
    assert all(torch.equal(twice[n], start[n]) for n in start)
    other = gw.half_reset(end, start, rest)

    def square(state):
        return sum(float((state[n] - start[n]).detach().double().square().sum()) for n in start)

    assert 0 < square(once) < square(end)
    assert square(once) + square(other) == pytest.approx(square(end), rel=1e-6)
    assert len(everything) == len(set(everything))


def test_half_reset_wants_tensors_that_fit():
    one = {"a": torch.ones(2)}
    with pytest.raises(UsageError, match="'b'"):
        gw.half_reset(one, one, ["b"])
    with pytest.raises(UsageError, match="shape"):
        gw.half_reset(one, {"a": torch.ones(3)}, [])
    with pytest.raises(UsageError, match="not in the base"):
        gw.half_reset(one, {}, [])
    assert gw.half_reset(one, {}, ["a"])["a"] is not one["a"]
    with pytest.raises(UsageError, match="neither"):
        gw.half_reset(one, one, ["a[0"])
