from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guywire.methods.merging import _limits
from guywire.methods.merging._limits import find_limit
from guywire.methods.merging.edits import Change, add, draw, elect, touched
from guywire.methods.merging.importance import magnitude_mask
from guywire.methods.merging.masks import BLOCK, keep_mask


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def models(n: int, count: int, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    base = torch.randn(n, generator=gen(seed))
    return base, [base + 0.1 * torch.randn(n, generator=gen(seed + 1 + i)) for i in range(count)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 4), st.integers(0, 99), st.sampled_from((0.0, 0.3, 0.9)))
def test_add_is_the_weighted_sum(n: int, count: int, seed: int, rate: float) -> None:
    base, tuned = models(n, count, seed)
    kept = [draw("w", i, rate, seed, n, 0, n) for i in range(count)]
    factors = [0.5 + i for i in range(count)]
    out = base.clone()
    add(base, [Change(base, t) for t in tuned], list(kept), factors, out)
    wanted = base.double().numpy()
    for t, k, f in zip(tuned, kept, factors, strict=True):
        for i in k.tolist():
            wanted[i] += f * (float(t[i]) - float(base[i]))
    np.testing.assert_allclose(out.numpy(), wanted, rtol=0, atol=2e-6)


def elected(base, tuned, kept, factors, weights, scale):
    """mergekit's consensus with normalisation, a position at a time."""
    out = [float(b) for b in base]
    for i in range(len(out)):
        d = [
            f * (float(t[i]) - float(base[i])) if i in k else 0.0
            for t, k, f in zip(tuned, kept, factors, strict=True)
        ]
        sign = 1.0 if sum(w * x for w, x in zip(weights, d, strict=True)) >= 0 else -1.0
        agree = [(w, x) for w, x in zip(weights, d, strict=True) if x * sign > 0]
        share = sum(w for w, _ in agree)
        out[i] += scale * sum(w * x for w, x in agree) / (share or 1.0)
    return out


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100), st.integers(1, 4), st.integers(0, 99), st.sampled_from((0.0, 0.4, 0.8)))
def test_elect_is_the_consensus_of_ties(n: int, count: int, seed: int, rate: float) -> None:
    base, tuned = (t.double() if isinstance(t, torch.Tensor) else t for t in models(n, count, seed))
    tuned = [t.double() for t in tuned]
    kept = [draw("w", i, rate, seed, n, 0, n) for i in range(count)]
    factors, weights = [1.0 / (1.0 - rate)] * count, [1.0 + i for i in range(count)]
    out = base.clone()
    some = [None if rate == 0.0 else k for k in kept]
    elect(base, [Change(base, t) for t in tuned], some, factors, weights, 0.7, out)
    sets = [set(k.tolist()) for k in kept]
    wanted = elected(base, tuned, sets, factors, weights, 0.7)
    np.testing.assert_allclose(out.numpy(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
def test_ties_agrees_with_peft(rate: float) -> None:
    peft = pytest.importorskip("peft.utils.merge_utils")
    base, tuned = models(1000, 3)
    deltas = [t - base for t in tuned]
    wanted = peft.ties(deltas, torch.ones(3), 1.0 - rate)
    out = base.clone()
    kept = [magnitude_mask(d, rate).nonzero().view(-1) for d in deltas]
    elect(base, [Change(base, t) for t in tuned], kept, [1.0] * 3, [1.0] * 3, 1.0, out)
    torch.testing.assert_close(out, base + wanted, rtol=0, atol=1e-6)


def test_linear_agrees_with_peft() -> None:
    peft = pytest.importorskip("peft.utils.merge_utils")
    base, tuned = models(100, 2)
    wanted = peft.task_arithmetic([t - base for t in tuned], torch.tensor([0.3, 0.9]))
    out = base.clone()
    add(base, [Change(base, t) for t in tuned], [None, None], [0.3, 0.9], out)
    torch.testing.assert_close(out, base + wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_change_of_factor_one_is_the_fine_tuned_value(dtype: torch.dtype) -> None:
    # base + (tuned - base) is not tuned where they differ a lot.
    base = torch.tensor([1e4, 1.0, -3.0]).to(dtype)
    tuned = torch.tensor([1e-4, 1.1, 5.0]).to(dtype)
    out = base.clone()
    add(base, [Change(base, tuned)], [torch.tensor([0, 2])], [1.0], out)
    assert out.tolist() == [tuned[0].item(), base[1].item(), tuned[2].item()]


def test_the_expectation_of_dare_is_the_whole_change() -> None:
    base, (tuned,) = models(50, 1)
    total = torch.zeros(50, dtype=torch.float64)
    draws = 4000
    for seed in range(draws):
        out = base.clone()
        add(base, [Change(base, tuned)], [draw("w", 0, 0.8, seed, 50, 0, 50)], [5.0], out)
        total += (out - base).double()
    delta = (tuned - base).double()
    error = (total / draws - delta) / (delta.abs() * (0.8 / 0.2 / draws) ** 0.5)
    assert float(error.abs().max()) < 4.5


def test_models_have_masks_of_their_own_and_pieces_fit_together() -> None:
    n = BLOCK + 500
    first, second = (draw("w", i, 0.9, 3, n, 0, n) for i in range(2))
    both = len(set(first.tolist()) & set(second.tolist()))
    assert abs(both - n * 0.01) < 5 * (n * 0.01) ** 0.5
    assert first.equal(keep_mask("w", n, 0.9, 3).nonzero().view(-1))
    parts = [draw("w", 1, 0.9, 3, n, a, b) + a for a, b in ((0, BLOCK), (BLOCK, n))]
    assert torch.cat(parts).equal(second)
    union = touched([first, second], n)
    assert union is not None
    assert union.tolist() == sorted({*first.tolist(), *second.tolist()})
    assert touched([first, None], n) is None


@pytest.mark.parametrize("kind", ["normal", "ties", "ramp", "equal", "sparse"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("step", [7, 300, 10_000])
def test_limits_keep_what_a_whole_tensor_would(
    kind: str, rate: float, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tiny samples, so that they mislead at times and the pass by classes is taken.
    monkeypatch.setattr(_limits, "_SAMPLE", 64)
    monkeypatch.setattr(_limits, "_STRETCH", 4)
    n = 5003
    delta = torch.randn(n, generator=gen(1))
    delta = {
        "normal": delta,
        "ties": (3 * delta).round(),
        "ramp": delta * torch.linspace(0, 100, n),
        "equal": torch.ones(n),
        "sparse": delta * (torch.arange(n) % 50 == 0),
    }[kind]
    pieces = [(a, min(a + step, n)) for a in range(0, n, step)]
    count = round((1.0 - rate) * n)
    limit = find_limit(lambda p: delta[p[0] : p[1]], pieces, count, lambda f, v: map(f, v))
    kept = torch.cat([limit.kept(delta[a:b], a) + a for a, b in pieces])
    assert kept.equal(magnitude_mask(delta, rate).nonzero().view(-1))
