"""Masks as parametrisations: default selections, the straight-through gradient, round trips."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import CheckpointError, SelectionError, UsageError
from guywire.methods.sparsity.mask_files import pack_bits, unpack_bits
from guywire.methods.sparsity.masks import masks_of, unmasked

transformers = pytest.importorskip("transformers")


def seeded(make, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make()


def clip():
    tower = {
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    text = tower | {
        "vocab_size": 20, "max_position_embeddings": 6, "eos_token_id": 2, "bos_token_id": 1,
        "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text, vision_config=tower | {"image_size": 8, "patch_size": 4}, projection_dim=6
    )
    return seeded(lambda: transformers.CLIPModel(config))


def vit():
    config = transformers.ViTConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return seeded(lambda: transformers.ViTForImageClassification(config))


def images(n=5, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def flip_some(model, share=0.3, seed=0):
    """Switch off a share of the weights of every mask."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".scores"):
                p[torch.rand(p.shape, generator=generator) < share] = 0.0


# What is masked by default.


def test_default_selection_is_the_image_tower_of_clip():
    model = clip()
    scores = gw.mask(model)
    per_layer = {f"self_attn.{part}_proj.weight" for part in ("q", "k", "v", "out")}
    wanted = {
        f"vision_model.encoder.layers.{layer}.{part}" for layer in range(2) for part in per_layer
    }
    assert set(scores) == wanted | {"vision_model.embeddings.patch_embedding.weight"}
    moving = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith(".scores") for name in moving)
    assert len(moving) == len(scores)


def test_default_selection_of_a_vit_whatever_its_names():
    names = set(gw.mask(vit()))
    assert len(names) == 5  # q, k, v, out and the patch embedding
    assert sum("patch_embeddings.projection" in name for name in names) == 1
    assert not any("mlp" in name or "classifier" in name for name in names)


def test_default_selection_of_fused_attention():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert set(gw.mask(model)) == {"self_attn.in_proj_weight", "self_attn.out_proj.weight"}


def test_a_model_without_attention_is_an_error():
    with pytest.raises(SelectionError, match="select="):
        gw.mask(nn.Linear(2, 2))


def test_frozen_weights_can_be_masked_and_a_glob_that_matches_nothing_says_so():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(SelectionError, match="no_such"):
        gw.mask(model, "no_such*")
    assert not any(p.requires_grad for p in model.parameters())
    assert list(gw.mask(model, "weight")) == ["weight"]


def test_shared_masked_and_parametrised_weights_are_refused():
    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].weight = shared[0].weight
    with pytest.raises(SelectionError, match="shared"):
        gw.mask(shared, "0.weight")
    model = nn.Sequential(nn.Linear(3, 3))
    gw.mask(model, "0.weight")
    with pytest.raises(SelectionError, match="already"):
        gw.mask(model, "*")
    assert model[0].bias.requires_grad is False


def test_scores_that_begin_off_are_refused():
    with pytest.raises(UsageError, match="threshold"):
        gw.mask(nn.Linear(2, 2), "weight", init=5e-3)


def test_nothing_is_frozen_if_so_asked():
    model = nn.Linear(2, 2)
    gw.mask(model, "weight", freeze=False)
    assert all(p.requires_grad for p in model.parameters())


# Check 2: the straight-through gradient.


def _effective_gradient(model, module, attribute, loss):
    """Return dL/d(b W) by putting b W in as a plain parameter."""
    plain = gw.fold_mask(copy.deepcopy(model))
    plain.requires_grad_(True)
    loss(plain).backward()
    return getattr(plain.get_submodule(module), attribute).grad


CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3)), "0", "weight", (5, 4)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2)), "0", "weight", (5, 2, 4, 4)),
}


@pytest.mark.parametrize("kind", CASES)
def test_check_2_gradient_is_that_of_the_effective_weight_times_the_weight(kind):
    make, module, attribute, shape = CASES[kind]
    model = seeded(make).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = gw.mask(model, f"{module}.{attribute}")[f"{module}.{attribute}"]
    flip_some(model)

    def loss(m):
        return m(x).tanh().square().sum()

    effective = _effective_gradient(model, module, attribute, loss)
    weight = model.get_submodule(module).parametrizations[attribute].original
    loss(model).backward()
    torch.testing.assert_close(scores.grad, effective * weight, rtol=1e-6, atol=1e-12)
    # It does not depend on the scores' values while the mask stays.
    before = scores.grad.clone()
    scores.grad = None
    with torch.no_grad():
        scores.copy_(torch.where(scores > 5e-3, 7.0, -3.0))
    loss(model).backward()
    assert torch.equal(scores.grad, before)


@pytest.mark.parametrize("attribute", ["in_proj_weight", "out_proj.weight"])
def test_check_2_gradient_of_fused_attention(attribute):
    model = seeded(lambda: nn.MultiheadAttention(6, 2, batch_first=True)).double()
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = gw.mask(model)
    flip_some(model)

    def loss(m):
        return m(x, x, x, need_weights=False)[0].tanh().square().sum()

    module, _, leaf = attribute.rpartition(".")
    effective = _effective_gradient(model, module, leaf, loss)
    weight = model.get_submodule(module).parametrizations[leaf].original
    loss(model).backward()
    torch.testing.assert_close(scores[attribute].grad, effective * weight, rtol=1e-6, atol=1e-12)


# Check 6: the threshold itself is off.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_check_6_a_score_at_the_threshold_is_off(dtype, training):
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    scores = gw.mask(model, "weight")["weight"]
    model.to(dtype).train(training)
    # For scores in half precision the next value above the threshold is farther away.
    at = torch.tensor(5e-3, dtype=dtype)
    above = torch.nextafter(at, torch.tensor(1.0, dtype=dtype))
    below = torch.nextafter(at, torch.tensor(0.0, dtype=dtype))
    scores = model.parametrizations.weight[0].scores
    with torch.no_grad():
        scores.copy_(torch.stack([below, at, above]))
        assert model.weight.tolist() == [[0.0, 0.0, 1.0]]
        assert model(torch.eye(3, dtype=dtype)).flatten().tolist() == [0.0, 0.0, 1.0]
    assert model.weight.dtype == dtype


def test_scores_of_a_bfloat16_model_are_float32_and_so_are_their_gradients():
    model = nn.Linear(3, 2).bfloat16()
    scores = gw.mask(model, "weight")["weight"]
    assert scores.dtype == torch.float32
    out = model(torch.ones(1, 3, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    weight = model.parametrizations.weight.original
    assert torch.equal(scores.grad, weight.detach().float())


# Check 7: folding and files.


@pytest.mark.parametrize("make", [clip, vit])
def test_check_7_the_folded_model_is_plain_and_computes_the_same(make):
    plain, model = make().eval(), make().eval()
    gw.mask(model)
    flip_some(model)
    run = (
        (lambda m: m.get_image_features(images()).pooler_output)
        if make is clip
        else (lambda m: m(images()).logits)
    )
    with torch.no_grad():
        wanted, untouched = run(model), run(plain)
        assert (wanted - untouched).abs().max() > 1e-4
        folded = gw.fold_mask(model)
        torch.testing.assert_close(run(folded), wanted, rtol=0, atol=1e-6)
    assert folded.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in folded.modules()] == [type(m) for m in plain.modules()]
    with pytest.raises(SelectionError, match="no masks"):
        gw.fold_mask(folded)


def test_unmask_gives_back_every_bit():
    model = vit()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    gw.mask(model)
    flip_some(model)
    gw.unmask(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("count", range(1, 18))
def test_check_7_bits_come_back_and_take_an_eighth_of_a_byte(count, tmp_path):
    generator = torch.Generator().manual_seed(count)
    on = torch.rand(count, generator=generator) < 0.5
    packed = pack_bits(on)
    assert packed.numel() == -(-count // 8)
    assert torch.equal(unpack_bits(packed, (count,)), on)
    path = tmp_path / "mask.safetensors"
    gw.save_mask(path, {"w": on})
    assert torch.equal(gw.load_mask(path)["w"], on)
    from safetensors.numpy import load_file

    (stored,) = load_file(path).values()  # any reader sees the bytes
    assert stored.nbytes == -(-count // 8)


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 999)
)
def test_packing_is_undone_by_unpacking_for_any_shape(shape, seed):
    on = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(on), shape), on)


def test_check_7_a_mask_file_makes_the_folded_model_of_the_plain_one(tmp_path):
    masked, plain = clip(), clip()
    gw.mask(masked)
    flip_some(masked)
    path = tmp_path / "mask.safetensors"
    gw.save_mask(path, masked)
    gw.apply_mask(plain, gw.load_mask(path))
    folded = gw.fold_mask(masked).state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(folded[name], value), name


def test_a_mask_that_does_not_fit_is_refused(tmp_path):
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(CheckpointError, match="other"):
        gw.apply_mask(model, {"weight": torch.zeros(2, 2).bool(), "other": torch.ones(1).bool()})
    with pytest.raises(CheckpointError, match="shape"):
        gw.apply_mask(model, {"weight": torch.zeros(3).bool()})
    assert torch.equal(model.weight, before)
    checkpoint.save(tmp_path / "x", {"a": 1})
    with pytest.raises(CheckpointError, match="no masks"):
        gw.load_mask(tmp_path / "x")
    with pytest.raises(CheckpointError, match="bytes"):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), (3,))


def test_the_report_counts_what_is_off():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    scores = gw.mask(model, "*.weight")
    with torch.no_grad():
        scores["0.weight"][:2] = -1.0
    report = gw.mask_report(model)
    assert report.off == {"0.weight": 8, "1.weight": 0}
    assert report.share == 8 / 30
    assert report.bytes == 3 + 2
    assert "26.67 % of 30" in str(report)
    with pytest.raises(SelectionError, match="no masks"):
        gw.mask_report(nn.Linear(1, 1))


# Round trips.


def test_deepcopy_and_state_dict_carry_masks():
    model = vit().eval()
    gw.mask(model)
    flip_some(model)
    twin = copy.deepcopy(model)
    other = vit().eval()
    gw.mask(other)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = model(images()).logits
        for again in (twin, other):
            assert torch.equal(again(images()).logits, wanted)
    for name, on in masks_of(model).items():
        assert torch.equal(masks_of(other)[name], on)
        assert torch.equal(masks_of(twin)[name], on)
    # A copy is of its own.
    flip_some(twin, share=1.0)
    with torch.no_grad():
        assert torch.equal(model(images()).logits, wanted)


@pytest.mark.parametrize("remove", [gw.fold_mask, gw.unmask])
def test_a_copy_can_be_folded_and_the_model_goes_on(remove):
    """PyTorch keeps the parametrised attribute on a class that copies share."""
    model = vit().eval()
    gw.mask(model)
    flip_some(model)
    with torch.no_grad():
        wanted = model(images()).logits
        remove(copy.deepcopy(model))
        assert torch.equal(model(images()).logits, wanted)
        gw.fold_mask(model)
        torch.testing.assert_close(model(images()).logits, wanted)


def test_a_compiled_masked_model_computes_the_same_and_has_the_same_gradient():
    torch._dynamo.reset()
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
    scores = gw.mask(model, "0.weight")["0.weight"]
    flip_some(model)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    wanted, scores.grad = scores.grad, None
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    torch.testing.assert_close(scores.grad, wanted)
    assert list(masks_of(compiled)) == ["0.weight"]


def test_the_original_is_the_model_with_its_masks_off():
    model, plain = vit().eval(), vit().eval()
    gw.mask(model)
    flip_some(model)
    with torch.no_grad():
        masked = model(images()).logits
        with unmasked(model):
            assert torch.equal(model(images()).logits, plain(images()).logits)
        assert torch.equal(model(images()).logits, masked)


def test_masks_in_the_fast_path_of_attention():
    """In evaluation PyTorch runs fused attention in one kernel, which must see the mask too."""
    model = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)).eval()
    gw.mask(model)
    flip_some(model, 0.5)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x).detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(gw.fold_mask(model)(x), fast, rtol=1e-4, atol=1e-5)
