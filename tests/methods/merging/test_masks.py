from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from guywire.core.errors import UsageError
from guywire.methods.merging import masks
from guywire.methods.merging.masks import BLOCK, keep_mask, survivors

GOLDEN = (
    [6, 18, 20, 37, 39, 51],
    [82805, 477492, 680550, 1508856, 1723286, 2055871, 2692810],
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
)
RATES = (0.03, 0.4, 0.5, 0.9, 0.99, 0.9999)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_all_or_nothing(rate: float) -> None:
    found = survivors("w", 3 * BLOCK // 2, rate)
    assert len(found) == (0 if rate else 3 * BLOCK // 2)
    assert found.dtype == torch.int64
    assert keep_mask("w", 7, rate).tolist() == [not rate] * 7


@pytest.mark.parametrize("rate", RATES)
def test_counts_of_blocks_are_binomial(rate: float) -> None:
    # 400 tensors of 10^5 weights: mean and variance within four standard errors.
    n, draws = 100_000, 400
    counts = np.array([len(survivors(f"t{i}", n, rate)) for i in range(draws)])
    mean, variance = n * (1 - rate), n * rate * (1 - rate)
    assert abs(counts.mean() - mean) < 4 * math.sqrt(variance / draws)
    error = variance * math.sqrt(2 / (draws - 1) + 1 / (variance * draws))
    assert abs(counts.var(ddof=1) - variance) < 4 * error


@pytest.mark.parametrize("rate", RATES)
def test_gaps_are_geometric(rate: float) -> None:
    found = survivors("w", BLOCK * (40 if rate > 0.99 else 1), rate, seed=5).numpy()
    gaps = np.diff(found, prepend=-1) - 1
    # Bins of equal expectation as far as the integers allow, at least 20 expected in each.
    edges = np.unique(stats.geom.ppf(np.linspace(0, 1, 40)[1:-1], 1 - rate, loc=-1))
    cdf = np.concatenate([[0.0], stats.geom.cdf(edges, 1 - rate, loc=-1), [1.0]])
    expected = np.diff(cdf) * len(gaps)
    seen = np.bincount(np.searchsorted(edges, gaps), minlength=len(expected))
    good = expected >= 20
    assert good.sum() >= 2
    pooled_e = np.append(expected[good], max(expected[~good].sum(), 1e-9))
    pooled_s = np.append(seen[good], seen[~good].sum())
    if pooled_e[-1] < 5:
        pooled_e, pooled_s = pooled_e[:-1], pooled_s[:-1]
    chi2 = ((pooled_s - pooled_e) ** 2 / pooled_e).sum()
    assert stats.chi2.sf(chi2, len(pooled_e) - 1) > 1e-4


def test_every_position_of_a_block_is_as_likely() -> None:
    # First and last weights are where a renewal process goes wrong. 4000 draws, 64 positions.
    hits = torch.stack([keep_mask(f"t{i}", 64, 0.8) for i in range(4000)]).double().mean(0)
    assert float((hits - 0.2).abs().max()) < 4.5 * math.sqrt(0.2 * 0.8 / 4000)


@pytest.mark.parametrize("other", [("w", 1), ("v", 0), ("w", 0)])
def test_blocks_names_and_seeds_are_independent(other: tuple[str, int]) -> None:
    rate = 0.7
    a = keep_mask("w", 2 * BLOCK, rate)
    name, seed = other
    b = keep_mask(name, 2 * BLOCK, rate, seed)
    if (name, seed) == ("w", 0):
        b = b.roll(BLOCK)  # the blocks of one tensor against each other
    table = [[int((x & y).sum()) for y in (b, ~b)] for x in (a, ~a)]
    if (name, seed) == ("w", 0):
        table = [[v // 2 for v in row] for row in table]  # each pair was counted twice
    assert stats.chi2_contingency(table, correction=False).pvalue > 1e-4


def test_neighbours_are_independent() -> None:
    m = keep_mask("w", BLOCK, 0.6)
    for lag in (1, 2, 17):
        a, b = m[:-lag:2], m[lag::2][: len(m[:-lag:2])]
        n = min(len(a), len(b))
        table = [[int((x & y).sum()) for y in (b[:n], ~b[:n])] for x in (a[:n], ~a[:n])]
        assert stats.chi2_contingency(table, correction=False).pvalue > 1e-4


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from((0.0, 0.2, 0.5, 0.9, 0.999, 1.0)),
    st.integers(0, 2 * BLOCK + 77),
    st.lists(st.integers(0, 2 * BLOCK + 77), max_size=3),
    st.integers(0, 3),
)
def test_any_slices_in_any_order_give_the_same(
    rate: float, numel: int, cuts: list[int], seed: int
) -> None:
    whole = survivors("w", numel, rate, seed)
    edges = sorted({0, numel, *(c for c in cuts if c < numel)})
    pairs = list(itertools.pairwise(edges))
    parts = {a: survivors("w", numel, rate, seed, start=a, stop=b) for a, b in reversed(pairs)}
    joined = torch.cat([parts[a] for a, _ in pairs]) if pairs else whole
    assert torch.equal(joined, whole)
    assert torch.equal(survivors("w", 3 * BLOCK, rate, seed, stop=numel), whole)


def test_long_gaps_are_put_together() -> None:
    # The mean gap is far beyond the table: 200 blocks, 2 * 10^8 weights, 210 expected.
    count = len(survivors("w", 200 * BLOCK, 1 - 1e-6))
    mean = 200 * BLOCK * 1e-6
    assert abs(count - mean) < 4 * math.sqrt(mean)
    assert len(survivors("w", 10 * BLOCK, math.nextafter(1.0, 0.0))) == 0
    assert len(survivors("w", 1000, 1e-300)) == 1000


def test_the_limits_are_exact() -> None:
    from fractions import Fraction

    for rate in (0.5, 0.9, 0.999):
        limits, _ = masks._table(rate)
        for k in (1, 2, len(limits) // 2, len(limits)):
            exact = (1 - Fraction(rate) ** k) * 2**64
            assert abs(int(limits[k - 1]) - exact) <= 1


def test_the_draw_never_changes() -> None:
    # Compressed deltas hold no index: another draw in a later version would ruin them silently.
    assert survivors("model.layers.0.mlp.up_proj.weight", 60, 0.9, 7).tolist() == GOLDEN[0]
    assert survivors("w", 3 * BLOCK, 1 - 2e-6, 1).tolist() == GOLDEN[1]
    assert keep_mask("w", 12, 0.25).int().tolist() == GOLDEN[2]


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_wrong_rate_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="the rate is"):
        survivors("w", 10, rate)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 11)])
def test_a_wrong_slice_is_refused(start: int, stop: int) -> None:
    with pytest.raises(UsageError, match="not inside a tensor of 10 weights"):
        survivors("w", 10, 0.5, start=start, stop=stop)


def test_at_high_rates_gaps_are_much_faster_than_a_mask() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = [], []
    survivors("w", BLOCK, 0.99)
    for i in range(9):
        begun = time.perf_counter()
        survivors("w", BLOCK, 0.99, i)
        half = time.perf_counter()
        np.flatnonzero(generator.random(BLOCK, dtype=np.float32) < 0.01)
        ours.append(half - begun)
        theirs.append(time.perf_counter() - half)
    assert min(ours) < 0.5 * min(theirs)
