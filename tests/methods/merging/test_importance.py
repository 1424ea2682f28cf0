"""Magnitude, WANDA and structural pruning of a change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guywire.core.errors import UsageError
from guywire.methods.merging import importance, magnitude_mask, structural_survivors, wanda_mask


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(0.0, 0.995), rows=st.integers(1, 40), columns=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 1000), ties=st.booleans(),
)  # fmt: skip
def test_check_7_magnitude_keeps_exactly_the_largest(rate, rows, columns, dtype, seed, ties):
    delta = normal(rows, columns, seed=seed, dtype=dtype)
    if ties:
        delta = delta.round()
    mask = magnitude_mask(delta, rate)
    assert mask.shape == delta.shape
    assert int(mask.sum()) == round((1 - rate) * delta.numel())
    kept, dropped = delta.abs()[mask], delta.abs()[~mask]
    if len(kept) and len(dropped):
        assert float(kept.min()) >= float(dropped.max())


def test_the_radix_search_goes_chunk_by_chunk(monkeypatch):
    delta = normal(37, 53).round(decimals=1)
    whole = magnitude_mask(delta, 0.7)
    monkeypatch.setattr(importance, "_CHUNK", 64)
    assert torch.equal(magnitude_mask(delta, 0.7), whole)
    norms = normal(53, seed=1)
    chunked = wanda_mask(delta, norms, 0.7)
    monkeypatch.undo()
    assert torch.equal(wanda_mask(delta, norms, 0.7), chunked)


def test_equal_magnitudes_keep_the_first():
    assert magnitude_mask(torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.5).tolist() == [1, 1, 0, 0]
    assert magnitude_mask(torch.zeros(4), 0.75).tolist() == [1, 0, 0, 0]
    assert wanda_mask(torch.ones(2, 3), torch.ones(3), 0.67).tolist() == [[1, 0, 0]] * 2


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.97])
def test_check_7_wanda_with_equal_inputs_is_magnitude_by_rows(rate):
    delta = normal(20, 64)
    mask = wanda_mask(delta, torch.full((64,), 3.7), rate)
    assert torch.equal(mask, magnitude_mask(delta, rate, by="row"))
    for row, kept in zip(delta.abs(), mask, strict=True):
        assert int(kept.sum()) == round((1 - rate) * 64)
        assert float(row[kept].min()) >= float(row[~kept].max())


def test_wanda_looks_at_what_comes_in():
    delta = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    mask = wanda_mask(delta, torch.tensor([10.0, 1.0, 1.0, 2.0]), 0.5)
    assert mask.tolist() == [[1, 0, 0, 1], [1, 1, 0, 0]]


def test_structural_survivors_lie_in_a_few_features():
    out, inside, rate, share = 60, 80, 0.9, 0.25
    kept = structural_survivors((out, inside), rate, share, seed=1, name="w")
    assert torch.equal(kept, kept.unique())  # increasing, each once
    features = (kept % inside).unique()
    assert 8 <= len(features) <= 32  # 20 of 80, give or take three standard deviations
    # The total rate is kept on average over seeds: 480 survivors, s.d. about 90 a draw.
    counts = [
        len(structural_survivors((out, inside), rate, share, seed=s, name="w")) for s in range(200)
    ]
    assert sum(counts) / 200 == pytest.approx(480, abs=4 * 95 / 200**0.5)
    # A share of 1 is plain dropping, a share of 1 - rate keeps whole features.
    assert (
        len((structural_survivors((out, inside), rate, 1.0, seed=1, name="w") % inside).unique())
        > 75
    )
    columns = structural_survivors((out, inside), rate, 0.1, seed=1, name="w")
    assert len(columns) == out * len((columns % inside).unique())
    assert torch.equal(kept, structural_survivors((out, inside), rate, share, seed=1, name="w"))
    assert not torch.equal(kept, structural_survivors((out, inside), rate, share, seed=1, name="v"))


def test_what_cannot_be_is_refused_with_the_remedy():
    with pytest.raises(UsageError, match=r"rate is 1.0"):
        magnitude_mask(torch.ones(3), 1.0)
    with pytest.raises(UsageError, match=r"a weight \[out, in\] and a norm for each"):
        wanda_mask(torch.ones(2, 3), torch.ones(2), 0.5)
    with pytest.raises(UsageError, match=r"share of 0.05 of the features cannot hold"):
        structural_survivors((4, 4), 0.9, 0.05, seed=0, name="w")
    with pytest.raises(UsageError, match="is no matrix"):
        structural_survivors((4,), 0.9, 0.5, seed=0, name="w")
