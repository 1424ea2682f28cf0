from __future__ import annotations

import numpy as np
import pytest
import torch

from guywire.methods.merging import _dense, _limits
from guywire.methods.merging._limits import Limit, find_limit, find_limits
from guywire.methods.merging.edits import Change, add, elect

N = 5000
ODD = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-42, -1e-42, 3e38]


def models(dtype: torch.dtype, kind: str, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(4)
    base = torch.randn(N, generator=g)
    tuned = [base + torch.randn(N, generator=g).mul(3).round() / 8 for _ in range(count)]
    if kind == "odd":
        for values in (base, *tuned):
            where = torch.randint(0, N, (40 * len(ODD),), generator=g)
            values[where] = torch.tensor(ODD).repeat(40)
    return base.to(dtype), [t.to(dtype) for t in tuned]


def pruned(changes: list[Change], limits: list[Limit]) -> tuple[list, list, list]:
    deltas, masks, kept = [], [], []
    for change, limit in zip(changes, limits, strict=True):
        kept.append(limit.kept(change.at(), 0))
        delta, mask, _ = _dense.prune(change.at(), limit, limit.ties.get(0, 0))
        deltas.append(delta)
        masks.append(mask)
    return deltas, masks, kept


def limits_of(changes: list[Change], share: float, n: int = N) -> list[Limit]:
    return [
        find_limit(lambda p, c=c: c.at()[p[0] : p[1]], [(0, n)], round(share * n), map)
        for c in changes
    ]


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Bit for bit; but which NaN a conversion gives depends on the place in the vector."""
    whole = torch.int16 if one.dtype.itemsize == 2 else torch.int32
    alike = one.view(whole) == two.view(whole)
    return bool((alike | (one.isnan() & two.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["ties", "odd"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("weights", [[1.0], [0.3], [0.5, -0.5], [1.0, 0.0], [0.7, 0.2, 1.0]])
def test_masks_add_and_elect_as_positions_do(
    dtype: torch.dtype, kind: str, share: float, weights: list[float]
) -> None:
    base, tuned = models(dtype, kind, len(weights))
    changes = [Change(base, t) for t in tuned]
    limits = limits_of(changes, share)
    for elects in (False, True):
        deltas, masks, kept = pruned(changes, limits)
        want, got = base.clone(), base.clone()
        if elects:
            votes = [abs(w) for w in weights]
            elect(base, changes, kept, [1.0] * len(weights), votes, 0.9, want)
            new = _dense.elected(base, deltas, votes, 0.9)
        else:
            add(base, changes, kept, weights, want)
            # A factor of 1 alone copies the model's values, which the caller sees to.
            new = tuned[0] if weights == [1.0] else _dense.added(base, deltas, weights)
        _dense.put(got, masks, new)
        assert same(got, want)


@pytest.mark.parametrize("stride", [1, 7, 1000, N])
def test_ties_are_kept_in_order_from_stride_to_stride(stride: int) -> None:
    g = torch.Generator().manual_seed(2)
    delta = torch.randn(N, generator=g).mul(2).round()
    limit = find_limit(lambda p: delta[p[0] : p[1]], [(0, N)], N // 4, map)
    assert 0 < limit.ties[0] < int((delta.abs().view(torch.int32) == limit.bits).sum())
    ties, masks = limit.ties[0], []
    for at in range(0, N, stride):
        _, mask, ties = _dense.prune(delta[at : at + stride], limit, ties)
        masks.append(mask)
    assert ties == 0
    kept = np.flatnonzero(np.concatenate(masks))
    assert (
        kept.tolist()
        == delta.abs().sort(descending=True, stable=True)[1][: N // 4].sort()[0].tolist()
    )
    assert limit.kept(delta, 0).tolist() == kept.tolist()


def test_models_whose_sample_misleads_are_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "_SAMPLE", 64)
    monkeypatch.setattr(_limits, "_STRETCH", 4)
    again: list[int] = []
    classes = _limits._classes
    monkeypatch.setattr(
        _limits, "_classes", lambda some, n, *rest: (again.append(n), classes(some, n, *rest))[1]
    )
    g = torch.Generator().manual_seed(7)
    fair = torch.randn(N, generator=g)
    unfair = torch.randn(N, generator=g)
    sparse = torch.where(torch.arange(N) % 50 == 0, fair, 0.0)
    pieces = [(at, min(at + 2000, N)) for at in range(0, N, 2000)]
    seen = np.concatenate(  # where the sample looks
        [np.linspace(a, b - 4, 5).astype(int)[:, None] + np.arange(4) for a, b in pieces]
    )
    unfair[seen.ravel()] = 100.0
    every = [fair, unfair, sparse]

    def deltas(slices: list[tuple[int, int]]) -> list[torch.Tensor]:
        return [torch.cat([d[a:b] for a, b in slices]) for d in every]

    found = find_limits(deltas, 3, pieces, N // 10, map, 300)
    assert again == [1]
    for delta, limit in zip(every, found, strict=True):
        kept = torch.cat([limit.kept(delta[a:b], a) + a for a, b in pieces])
        order = delta.abs().sort(descending=True, stable=True)[1]
        assert kept.tolist() == order[: N // 10].sort()[0].tolist()


def test_changes_that_vanish_leave_a_negative_zero_as_sums_from_zero_do() -> None:
    base, tuned = torch.full((8,), -0.0), torch.full((8,), -1e-45)
    changes = [Change(base, tuned), Change(base, tuned)]
    want, got = base.clone(), base.clone()
    deltas, masks, kept = pruned(changes, limits_of(changes, 1.0, 8))
    add(base, changes, kept, [0.5, 0.5], want)
    _dense.put(got, masks, _dense.added(base, deltas, [0.5, 0.5]))
    assert not want.signbit().any()
    assert same(got, want)
