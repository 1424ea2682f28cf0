"""The terms of AlignGuard-LoRA: the numbered checks of the sheet that need no model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guywire.core.errors import UsageError
from guywire.methods.adapters.alignguard_terms import (
    Product,
    critical_subspace,
    fisher_norm,
    geodesic_overlap,
    layer_terms,
    riemannian_overlap,
    split_update,
    squared_norm,
)

D, K, M = 12, 8, 3


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def fisher(seed=5):
    root = draw(D, D, seed=seed)
    return root @ root.T


def top(m=M):
    values, vectors = torch.linalg.eigh(fisher())
    return vectors.flip(1)[:, :m], values.flip(0)[:m]


def thin(seed, r=3):
    return Product(draw(D, r, seed=seed), draw(r, K, seed=seed + 50))


def dense(product):
    return product.left @ product.right


def test_check_2_at_the_start_everything_is_zero_with_finite_gradients():
    basis, values = top()
    for two_branch in (True, False):
        factors = [draw(3, K, seed=1), torch.zeros(D, 3).double()] * 2
        factors = [f.clone().requires_grad_() for f in factors]
        updates = [Product(factors[1], factors[0]), Product(factors[3], factors[2])]
        terms = layer_terms(updates, basis, values, two_branch=two_branch)
        assert set(terms) == {"aligned", "task", "overlap", "geodesic"}
        for value in terms.values():
            assert float(value.detach()) == 0.0
            for g in torch.autograd.grad(value, factors, retain_graph=True):
                assert bool(g.isfinite().all())


def test_check_3_an_orthogonal_split():
    basis, _ = top()
    p = basis @ basis.T
    update = draw(D, K)
    a, t = split_update(update, basis)
    for found, wanted in ((p @ p, p), (p.T, p), (a + t, update), (a, p @ update)):
        assert float((found - wanted).abs().max()) < 1e-10
    whole = float(update.square().sum())
    assert abs(whole - float(a.square().sum() + t.square().sum())) < 1e-10


def test_check_4_the_fisher_norm_is_that_of_the_matrix_root():
    basis, values = top()
    f = fisher()
    all_values, all_vectors = torch.linalg.eigh(f)
    root = all_vectors @ all_values.sqrt().diag() @ all_vectors.T
    update = draw(D, K)
    a, _ = split_update(update, basis)
    wanted = float((root @ a).square().sum())
    assert abs(float(fisher_norm(update, basis, values)) - wanted) < 1e-9 * wanted


def test_check_5_geodesic_overlap():
    basis, _ = top()
    # Projected: inert, with its gradient, whatever the update is.
    for seed in range(5):
        update = draw(D, K, seed=seed).requires_grad_()
        value = geodesic_overlap(*split_update(update, basis))
        assert abs(float(value)) < 1e-20
        (g,) = torch.autograd.grad(value, update)
        assert float(g.abs().max()) < 1e-10
    # Two branches.
    a, b = draw(D, K, seed=1), draw(D, K, seed=2)
    assert abs(float(geodesic_overlap(a, a)) - 1.0) < 1e-12
    off = b - a * (a * b).sum() / a.square().sum()
    assert float(geodesic_overlap(a, off)) < 1e-28
    for c in (-3.0, 0.01, 100.0):
        for scaled in (geodesic_overlap(c * a, b), geodesic_overlap(a, c * b)):
            assert abs(float(scaled) - float(geodesic_overlap(a, b))) < 1e-10


def test_check_6_riemannian_overlap():
    a, t = draw(D, K, seed=1), draw(D, K, seed=2)
    plain = float((a * t).abs().mean())
    for found, wanted in (
        (riemannian_overlap(a, t, beta=0.0), plain),
        (riemannian_overlap(a, t, beta=4.0, tau=50.0), plain),
        (riemannian_overlap(a, t, beta=4.0, tau=-50.0), 5.0 * plain),
        (riemannian_overlap(t, a), float(riemannian_overlap(a, t))),
        (riemannian_overlap(a, t, reduce="sum"), D * K * float(riemannian_overlap(a, t))),
    ):
        assert abs(float(found) - wanted) < 1e-12 * wanted
    with pytest.raises(UsageError, match="reduce='max'"):
        riemannian_overlap(a, t, reduce="max")


def test_eta_can_look_at_the_updated_weight():
    a, t, base = draw(D, K, seed=1), draw(D, K, seed=2), draw(D, K, seed=3)
    wanted = 0.0
    for i in range(D):
        for j in range(K):
            eta = 1 + 4 / (1 + torch.exp(-((base + a + t)[i, j].abs() - 0.01)))
            wanted += float(eta * (a[i, j] * t[i, j]).abs()) / (D * K)
    assert abs(float(riemannian_overlap(a, t, base=base)) - wanted) < 1e-12


def test_check_8_all_directions_or_none():
    update = thin(1)
    everything = critical_subspace(fisher(), 1.0)
    assert everything[0].shape == (D, D)
    assert float(split_update(dense(update), everything[0])[1].abs().max()) < 1e-12
    nothing = critical_subspace(fisher(), 0.0)
    assert nothing[0].shape == (D, 0)
    terms = layer_terms([update], *nothing, two_branch=False)
    assert [float(terms[k]) for k in ("aligned", "overlap", "geodesic")] == [0.0, 0.0, 0.0]
    torch.testing.assert_close(terms["task"], dense(update).square().sum())


@pytest.mark.parametrize(("weight_a", "weight_t"), [(0.25, 0.5), (3.0, 0.0), (0.0, 2.0)])
def test_check_9_the_optimum_of_a_quadratic_task(weight_a, weight_t):
    """Direction by direction the target is shrunk by 1 / (1 + 2 weight)."""
    basis, values = top()
    target = draw(D, K, seed=9)
    shrunk = (basis.T @ target) / (1 + 2 * weight_a * values)[:, None]
    rest = split_update(target, basis)[1] / (1 + 2 * weight_t)
    wanted = basis @ shrunk + rest
    update = torch.zeros(D, K, dtype=torch.float64, requires_grad=True)
    rate = 1.0 / (1.0 + 2 * max(weight_a * float(values[0]), weight_t))
    for _ in range(3000):
        rest_of = split_update(update, basis)[1]
        loss = 0.5 * (update - target).square().sum()
        loss = loss + weight_a * fisher_norm(update, basis, values)
        loss = loss + weight_t * rest_of.square().sum()
        (g,) = torch.autograd.grad(loss, update)
        update = (update - rate * g).detach().requires_grad_()
    assert float((update.detach() - wanted).abs().max()) < 1e-6


def test_the_fewest_directions_with_the_energy():
    f = torch.diag(torch.tensor([1.0, 6.0, 3.0, 0.0]))
    for energy, m in ((0.0, 0), (0.5, 1), (0.6, 1), (0.61, 2), (0.9, 2), (0.95, 3), (1.0, 3)):
        assert critical_subspace(f, energy)[0].shape == (4, m), energy
    assert critical_subspace(torch.zeros(4, 4))[0].shape == (4, 0)
    with pytest.raises(UsageError, match=r"energy=1\.5"):
        critical_subspace(f, 1.5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), r=st.integers(1, 5))
def test_factors_say_what_their_products_say(seed, r):
    basis, values = top()
    a, t = thin(seed, r), thin(seed + 1, 2)
    base, metric = draw(D, K, seed=seed + 2), draw(D, K, seed=seed + 3).abs()
    pairs = [
        (fisher_norm(a, basis, values), fisher_norm(dense(a), basis, values)),
        (squared_norm(a), dense(a).square().sum()),
        (squared_norm(a, metric), (metric * dense(a).square()).sum()),
        (geodesic_overlap(a, t), geodesic_overlap(dense(a), dense(t))),
        (riemannian_overlap(a, t), riemannian_overlap(dense(a), dense(t))),
        (
            riemannian_overlap(a, t, base=base, tau=1.0),
            riemannian_overlap(dense(a), dense(t), base=base, tau=1.0),
        ),
    ]
    for thin_value, dense_value in pairs:
        torch.testing.assert_close(thin_value, dense_value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("two_branch", [True, False])
def test_layer_terms_are_those_of_dense_updates(two_branch):
    basis, values = top()
    task, aligned = thin(1), thin(2, 2)
    found = layer_terms([task, aligned], basis, values, two_branch=two_branch)
    t, a = dense(task), dense(aligned)
    p = basis @ basis.T
    if two_branch:
        wanted_aligned = fisher_norm(a, basis, values) + fisher_norm(t, basis, values)
        wanted_task = t.square().sum() + (a - p @ a).square().sum()
    else:
        wanted_aligned = fisher_norm(a + t, basis, values)
        a, t = split_update(a + t, basis)
        wanted_task = t.square().sum()
    torch.testing.assert_close(found["aligned"], wanted_aligned)
    torch.testing.assert_close(found["task"], wanted_task)
    torch.testing.assert_close(found["overlap"], riemannian_overlap(a, t))
    torch.testing.assert_close(found["geodesic"], geodesic_overlap(a, t), atol=1e-20, rtol=1e-7)


def test_the_gradient_of_the_overlap_is_autograds():
    for base in (None, draw(D, K, seed=7)):
        given_ = [x for seed in (1, 2) for x in thin(seed)]
        results = []
        for through_products in (False, True):
            leaves = [x.clone().requires_grad_() for x in given_]
            updates = Product(*leaves[:2]), Product(*leaves[2:])
            if through_products:
                updates = tuple(u.left @ u.right for u in updates)
            value = 3.0 * riemannian_overlap(*updates, base=base, tau=0.5)
            results.append(torch.autograd.grad(value, leaves))
        for mine, autograds in zip(*results, strict=True):
            torch.testing.assert_close(mine, autograds, rtol=1e-10, atol=1e-12)


def test_more_rows_than_are_held_at_a_time():
    a = Product(draw(600, 2, seed=1), draw(2, 5, seed=2))
    t = Product(draw(600, 3, seed=3), draw(3, 5, seed=4))
    torch.testing.assert_close(riemannian_overlap(a, t), riemannian_overlap(dense(a), dense(t)))
