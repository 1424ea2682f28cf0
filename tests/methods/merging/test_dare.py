"""Dropping and rescaling: what is bit for bit, what is so on average, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import guywire as gw
from guywire.core.errors import SelectionError, UsageError
from guywire.methods.merging import keep, prunable, rescale_kept, rescaled


def pair(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    base, tuned = {}, {}
    for name, shape in {"a.weight": (30, 20), "a.bias": (30,), "head.weight": (4, 30)}.items():
        base[name] = torch.randn(shape, generator=generator).to(dtype)
        tuned[name] = (base[name] + 0.1 * torch.randn(shape, generator=generator)).to(dtype)
    return base, tuned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_check_2_nothing_dropped_is_the_tuned_model_bit_for_bit(dtype):
    base, tuned = pair(dtype=dtype)
    for name, value in gw.drop_and_rescale(base, tuned, 0.0).items():
        assert value.dtype == dtype
        assert torch.equal(value, tuned[name])
        assert value.data_ptr() != tuned[name].data_ptr()


@pytest.mark.parametrize("rate", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_2_without_a_change_it_is_the_base_bit_for_bit(rate, dtype):
    base, _ = pair(dtype=dtype)
    same = {name: value.clone() for name, value in base.items()}
    for name, value in gw.drop_and_rescale(base, same, rate).items():
        assert torch.equal(value, base[name])


def test_check_2_q_of_one_minus_rate_is_dare():
    base, tuned = pair()
    kept = keep(base, tuned, 0.8, seed=3)
    edited = gw.drop_and_rescale(base, tuned, 0.8, 1.0 - 0.8, seed=3)
    default = gw.drop_and_rescale(base, tuned, 0.8, seed=3)
    for name, where in kept.items():
        mask = torch.zeros(base[name].numel()).index_fill_(0, where, 1.0).view(base[name].shape)
        by_hand = base[name] + mask * (tuned[name] - base[name]) / (1.0 - 0.8)
        torch.testing.assert_close(edited[name], by_hand, rtol=1e-6, atol=1e-6)
        dropped = mask == 0
        assert torch.equal(edited[name][dropped], base[name][dropped])
        assert torch.equal(default[name], edited[name])


def test_check_2_agrees_in_distribution_with_peft():
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    n, rate = 100_000, 0.9
    delta = {"w": torch.ones(n)}
    ours = gw.drop_and_rescale({"w": torch.zeros(n)}, delta, rate, seed=5)["w"]
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        theirs = merge_utils.random_pruning(delta["w"].clone(), density=1 - rate, rescale=True)
    # A draw is 1 / (1 - p) with probability 1 - p: mean 1, variance p / (1 - p).
    variance = rate / (1 - rate)
    fourth = (rate * 1.0**4) + (1 - rate) * (1 / (1 - rate) - 1.0) ** 4
    for draw in (ours, theirs):
        x = draw.double()
        assert abs(float(x.mean()) - 1.0) < 4 * (variance / n) ** 0.5
        assert abs(float(x.var()) - variance) < 4 * ((fourth - variance**2) / n) ** 0.5


@settings(max_examples=30, deadline=None)
@given(
    first=st.floats(0.05, 1.0), second=st.floats(0.05, 1.0), rate=st.floats(0.0, 0.99),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_check_8_linear_in_one_over_q(first, second, rate, seed):
    base, tuned = pair(dtype=torch.float64)
    kept = keep(base, tuned, rate, seed=seed)
    one, two = (rescale_kept(base, tuned, kept, q) for q in (first, second))
    for name in kept:
        torch.testing.assert_close(
            (one[name] - base[name]) * first, (two[name] - base[name]) * second,
            rtol=1e-6, atol=1e-12,
        )  # fmt: skip


def test_check_9_masks_do_not_depend_on_order_or_shards():
    base, tuned = pair()
    whole = keep(base, tuned, 0.9, seed=1)
    backwards = keep(base, dict(reversed(tuned.items())), 0.9, seed=1)
    shards = {}
    for names in (["head.weight"], ["a.bias", "a.weight"]):
        shards |= keep(base, {n: tuned[n] for n in names}, 0.9, seed=1)
    for name, where in whole.items():
        assert torch.equal(where, backwards[name])
        assert torch.equal(where, shards[name])
    other = keep(base, tuned, 0.9, seed=2)
    assert any(not torch.equal(where, other[n]) for n, where in whole.items())
    # Two tensors of one shape get different masks: the name counts.
    twins = {"x": torch.zeros(1000), "y": torch.zeros(1000)}
    kept = keep(twins, twins, 0.9)
    assert not torch.equal(kept["x"], kept["y"])


def test_what_is_excluded_unknown_or_no_float_stays_as_tuned():
    base, tuned = pair()
    tuned["new.weight"] = torch.randn(3, 3)
    base["count"], tuned["count"] = torch.tensor(3), torch.tensor(7)
    base["gone"] = torch.zeros(2)
    edited = gw.drop_and_rescale(base, tuned, 0.9, exclude="head.*")
    assert edited.keys() == tuned.keys()
    for name in ("head.weight", "new.weight", "count"):
        assert torch.equal(edited[name], tuned[name])
    assert not torch.equal(edited["a.weight"], tuned["a.weight"])
    assert prunable(base, tuned, "a.*", "*.bias") == ["a.weight"]
    assert prunable(base, tuned, ["*.bias", "head.*"]) == ["a.bias", "head.weight"]


def test_each_tensor_may_have_its_own_q():
    base, tuned = pair()
    kept = keep(base, tuned, 0.5)
    qs = {"a.weight": 0.5, "a.bias": 0.6, "head.weight": 1.0}
    edited = rescale_kept(base, tuned, kept, qs)
    for name, q in qs.items():
        assert torch.equal(edited[name], rescaled(base[name], tuned[name], kept[name], q))
    where = kept["head.weight"]
    assert torch.equal(edited["head.weight"].view(-1)[where], tuned["head.weight"].view(-1)[where])


def test_a_mask_of_the_tensors_shape_does_as_well_as_positions():
    base, tuned = pair()
    where = keep(base, tuned, 0.9)["a.weight"]
    mask = torch.zeros(600, dtype=torch.bool).index_fill_(0, where, True).view(30, 20)
    arguments = base["a.weight"], tuned["a.weight"]
    assert torch.equal(rescaled(*arguments, where, 0.3), rescaled(*arguments, mask, 0.3))


def test_transposed_tensors_and_an_empty_one():
    base, tuned = torch.zeros(4, 3).T, torch.arange(12.0).view(4, 3).T
    edited = rescaled(base, tuned, torch.tensor([0, 5]), 0.5)
    wanted = torch.zeros(12).index_copy_(
        0, torch.tensor([0, 5]), 2 * tuned.reshape(-1)[torch.tensor([0, 5])]
    )
    assert torch.equal(edited.reshape(-1), wanted)
    empty = gw.drop_and_rescale({"e": torch.empty(0)}, {"e": torch.empty(0)}, 0.5)
    assert empty["e"].shape == (0,)


def test_what_cannot_be_is_refused_with_the_remedy():
    base, tuned = pair()
    with pytest.raises(UsageError, match=r"rate is 1.0: it is the share that is dropped"):
        gw.drop_and_rescale(base, tuned, 1.0)
    with pytest.raises(UsageError, match=r"q is 1.5"):
        gw.drop_and_rescale(base, tuned, 0.5, 1.5)
    with pytest.raises(UsageError, match=r"no q for 'a.bias'"):
        gw.drop_and_rescale(base, tuned, 0.5, {"a.weight": 0.5, "head.weight": 0.5})
    with pytest.raises(SelectionError, match="leave none of the 3 tensors"):
        gw.drop_and_rescale(base, tuned, 0.5, exclude="*")
    tuned["head.weight"] = torch.zeros(5, 30)
    with pytest.raises(UsageError, match=r"\(4, 30\) in the base and \(5, 30\) fine-tuned"):
        gw.drop_and_rescale(base, tuned, 0.5)


def test_lora_prunes_the_merged_update():
    peft = pytest.importorskip("peft")
    from guywire.methods.adapters._lora import sites

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
        model = peft.inject_adapter_in_model(
            peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False),
            plain,
        )
    (site,) = sites(model)
    name = f"{site.name}.weight"
    base = {name: site.base.clone()}
    tuned = {name: (site.base + site.update()).detach()}
    site.layer.merge()  # PEFT's own merge
    torch.testing.assert_close(
        gw.drop_and_rescale(base, tuned, 0.0)[name], site.layer.get_base_layer().weight.detach()
    )
    edited = gw.drop_and_rescale(base, tuned, 0.9, 0.4)[name] - base[name]
    kept = edited != 0
    assert 60 < int(kept.sum()) < 180  # 120 of 1200, give or take six standard deviations
    torch.testing.assert_close(edited[kept], (tuned[name] - base[name])[kept] / 0.4)
    assert int(torch.linalg.matrix_rank(edited)) > 3  # what was pruned is no product of factors
