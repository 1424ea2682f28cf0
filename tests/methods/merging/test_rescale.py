"""Moments, bounds and closed forms of DAREx-q, against enumeration, draws and the released scan."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guywire.core.errors import UsageError
from guywire.methods.merging import (
    LayerInputs,
    analytic_q,
    contributions,
    error_moments,
    eta_of_one,
    layer_qs,
    output_energy,
    phi,
    q_star,
    tail_bound,
)
from guywire.methods.merging.masks import survivors
from guywire.methods.merging.rescale import row_qs


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_check_1_moments_equal_the_enumeration_of_all_masks():
    n, p, q = 10, 0.8, 0.35
    c = normal(n)
    mean = square = total = 0.0
    for bits in itertools.product((0.0, 1.0), repeat=n):  # 1 is dropped
        dropped = torch.tensor(bits, dtype=torch.float64)
        weight = p ** sum(bits) * (1 - p) ** (n - sum(bits))
        error = float((c * (1 - (1 - dropped) / q)).sum())
        mean, square, total = mean + weight * error, square + weight * error**2, total + weight
    assert total == pytest.approx(1.0, abs=1e-12)
    b, variance = error_moments(c, p, q)
    assert abs(float(b) - mean) < 1e-12
    assert abs(float(b**2 + variance) - square) < 1e-12


def test_moments_of_dare_and_of_many_units():
    c = normal(3, 20)
    mean, variance = error_moments(c, 0.9, 0.1)
    torch.testing.assert_close(mean, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(variance, 9.0 * c.square().sum(1))


def test_check_3_phi():
    assert phi(0.9) == pytest.approx(0.364096, abs=5e-7)
    assert phi(0.99) == pytest.approx(0.213270, abs=5e-7)
    assert phi(0.5) == 0.5
    assert phi(0.0) == phi(1.0) == 0.0
    for p in (0.01, 0.3, 0.4999, 0.49999999):
        assert phi(p) == pytest.approx(phi(1 - p), rel=1e-9)
        assert phi(p) == pytest.approx((1 - 2 * p) / math.log((1 - p) / p), rel=1e-6)


@pytest.mark.parametrize("q", [None, 0.4])
def test_check_3_the_tail_bound_holds(q):
    n, p, gamma, draws, chunk = 200, 0.9, 0.05, 200_000, 20_000
    c = normal(n) + 0.5
    bound = float(tail_bound(c, p, gamma, q))
    divisor = 1 - p if q is None else q
    mean = float(error_moments(c, p, divisor)[0])
    over, errors = 0, []
    for i in range(draws // chunk):
        kept = torch.zeros(chunk * n, dtype=torch.float64)
        kept[survivors("c", chunk * n, p, i)] = 1.0
        error = (c * (1 - kept.view(chunk, n) / divisor)).sum(1)
        over += int(((error - mean).abs() > bound).sum())
        errors.append(error)
    assert over / draws <= gamma
    # The draws themselves have the moments that are claimed.
    drawn = torch.cat(errors)
    _, variance = error_moments(c, p, divisor)
    assert abs(float(drawn.mean()) - mean) < 5 * float(variance / draws) ** 0.5
    assert float(drawn.var()) == pytest.approx(float(variance), rel=0.02)


def test_check_4_equal_contributions():
    # n = 100, p = 0.99: 1 - p + p / n = 0.0199.
    q = q_star(torch.ones(1, 100), torch.ones(100), 0.99)
    assert q == pytest.approx(0.0199, abs=1e-9)
    assert q_star(torch.full((7, 50), -2.0), torch.full((50,), 0.3), 0.9) == pytest.approx(
        0.1 + 0.9 / 50, rel=1e-5
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), p=st.sampled_from([0.5, 0.9, 0.99]), shift=st.floats(0.1, 2))
def test_check_4_is_the_grid_minimum_of_the_mean_square(seed, p, shift):
    delta, inputs = normal(5, 30, seed=seed) + shift, normal(8, 30, seed=seed + 1) + 1.0
    bias = normal(5, seed=seed + 2)
    found = q_star(delta, inputs, p, bias)
    step = 2e-5
    grid = torch.arange(1 - p, 1.0 + step, step, dtype=torch.float64)
    loss = torch.zeros_like(grid)
    for x in inputs:
        c = torch.cat([delta * x, bias.unsqueeze(1)], 1)
        s, square = c.sum(1), c.square().sum(1)
        u = 1 / grid
        loss += ((1 - (1 - p) * u) ** 2) * s.square().sum() + p * (1 - p) * u**2 * square.sum()
    assert abs(found - float(grid[loss.argmin()])) < 1e-4


def test_check_4_no_sum_means_no_rescaling():
    assert q_star(torch.tensor([[1.0, -1.0]]), torch.ones(2), 0.9) == 1.0
    # The minimum for one unit: p Q S^2 / ((1 - p) S^2 + p Q).
    c, p = normal(50) + 0.3, 0.9
    q = q_star(c.unsqueeze(0), torch.ones(50, dtype=torch.float64), p)
    mean, variance = error_moments(c, p, q)
    s2, qq = float(c.sum() ** 2), float(c.square().sum())
    assert float(mean**2 + variance) == pytest.approx(p * qq * s2 / ((1 - p) * s2 + p * qq))


def test_energy_is_that_of_the_contributions_and_adds_up():
    delta, x, bias = normal(4, 6), normal(6, seed=1), normal(4, seed=2)
    c = contributions(delta, x, bias)
    assert c.shape == (4, 7)
    squares, sums = output_energy(delta, x, bias)
    assert squares == pytest.approx(float(c.square().sum()))
    assert sums == pytest.approx(float(c.sum(1).square().sum()))
    rows = torch.stack([x, 2 * x])
    assert output_energy(delta, rows) == pytest.approx(
        tuple(2.5 * value for value in output_energy(delta, x))
    )


def scan(c, p, eta, gamma=0.95, step=1e-3, passed=0.8):
    """The released scan: every row, step by step, with ``|S|``; ends as 80 % of rows are past."""
    s, square = c.sum(1).abs(), c.square().sum(1)
    best = torch.full((len(c),), 1 - p, dtype=torch.float64)
    lowest = torch.full((len(c),), math.inf, dtype=torch.float64)
    past = torch.zeros(len(c), dtype=torch.bool)
    for i in range(int((0.998 - (1 - p)) / step + 1e-9) + 1):
        q = 1 - p + i * step
        value = (
            eta * (1 - (1 - p) / q) * s
            + eta**2 * phi(p) * square / (4 * q * q)
            + math.log(2 / (1 - gamma))
        ).abs()
        better = value < lowest
        past |= ~better
        best[better], lowest[better] = q, value[better]
        if float(past.double().mean()) >= passed:
            break
    return best


@pytest.mark.parametrize("p", [0.9, 0.99])
@pytest.mark.parametrize("eta", [0.05, 0.4, 1.0])
def test_check_5_the_closed_form_equals_the_scan(p, eta):
    c = normal(40, 64, seed=3) + 0.4  # S > 0
    assert bool((c.sum(1) > 0).all())
    q = eta * phi(p) * c.square().sum(1) / (2 * (1 - p) * c.sum(1))
    scanned = scan(c, p, eta, passed=1.1)  # no row ends the others' scan
    assert float((scanned - q.clamp(1 - p, 0.998)).abs().max()) <= 1e-3
    # With the early end, and with sums of either sign.
    mixed = torch.cat([c, -c])
    assert float((row_qs(mixed, p, eta) - scan(mixed, p, eta)).abs().max()) <= 2e-3
    assert abs(analytic_q(mixed, p, eta) - float(scan(mixed, p, eta).mean())) <= 1e-3


def test_one_row_with_an_outlier_feature_does_not_decide():
    c = normal(40, 64, seed=3) + 0.4
    calm = analytic_q(c, 0.99, 0.3)
    c[:4] = 0.0
    c[:4, 0], c[:4, 1] = 100.0, -99.0  # S = 1, Q = 20000: its own optimum is far beyond 1
    assert abs(analytic_q(c, 0.99, 0.3) - calm) < 0.5 * calm


def test_the_sign_of_a_rows_sum_does_not_matter_and_eta_scales():
    c = normal(6, 20) + 0.7
    assert analytic_q(c, 0.99, 0.1) == analytic_q(-c, 0.99, 0.1)
    assert analytic_q(c, 0.99, 1e-6) == pytest.approx(0.01)
    assert analytic_q(c, 0.99, 1e6) == pytest.approx(0.998)
    assert analytic_q(c, 0.99, 0.05) < analytic_q(c, 0.99, 0.1)
    assert analytic_q(torch.zeros(3, 4), 0.9, 1.0) == pytest.approx(0.1)


def seen(mean, rows, transposed=False):
    return LayerInputs(mean, rows.square().mean(0), len(rows), rows, transposed)


def test_layers_biases_and_the_rest_get_their_q():
    base = {
        "one.weight": torch.zeros(3, 5), "one.bias": torch.zeros(3),
        "two.weight": torch.zeros(4, 3), "norm.weight": torch.ones(3),
    }  # fmt: skip
    tuned = {
        "one.weight": normal(3, 5).float() + 0.5, "one.bias": torch.ones(3),
        "two.weight": normal(4, 3).float() + 0.5, "norm.weight": torch.ones(3) * 1.1,
    }  # fmt: skip
    x = {"one": normal(9, 5).float() + 1, "two": normal(9, 4).float() + 1}
    inputs = {  # the second keeps its weight as [in, out]
        "one": seen(x["one"].mean(0), x["one"]), "two": seen(x["two"].mean(0), x["two"], True),
    }  # fmt: skip
    qs = layer_qs(base, tuned, 0.9, inputs)
    assert qs["one.weight"] == q_star(tuned["one.weight"], x["one"], 0.9, tuned["one.bias"])
    assert qs["two.weight"] == q_star(tuned["two.weight"].T, x["two"], 0.9)
    assert qs["one.bias"] == qs["one.weight"]
    assert qs["norm.weight"] == pytest.approx((qs["one.weight"] + qs["two.weight"]) / 2)
    # Where half of the rows would have to have q >= 1; the mean of clipped ones is less.
    one = eta_of_one(base, tuned, 0.9, inputs)
    own = [
        contributions(tuned["one.weight"], x["one"].mean(0), tuned["one.bias"]),
        contributions(tuned["two.weight"].T, x["two"].mean(0)),
    ]
    free = torch.cat([phi(0.9) * c.square().sum(1) / (0.2 * c.sum(1).abs()) for c in own])
    assert float((one * free >= 1).double().mean()) == pytest.approx(0.5, abs=0.2)
    analytic = layer_qs(base, tuned, 0.9, inputs, eta=0.3)
    c = contributions(tuned["two.weight"].T, x["two"].mean(0))
    assert analytic["two.weight"] == analytic_q(c, 0.9, 0.3)


def test_half_precision_changes_are_summed_in_float32():
    delta = torch.full((1, 4096), 1e-4, dtype=torch.float16)  # squares are 1e-8: zero in float16
    squares, sums = output_energy(delta, torch.ones(4096))
    assert squares == pytest.approx(4096 * float(delta[0, 0].float()) ** 2, rel=1e-4)
    assert sums == pytest.approx((4096 * float(delta[0, 0].float())) ** 2, rel=1e-4)


def test_what_cannot_be_is_refused_with_the_remedy():
    with pytest.raises(UsageError, match="eta is 0"):
        analytic_q(torch.ones(2, 2), 0.9, 0.0)
    with pytest.raises(UsageError, match=r"shape \(2, 3\) does not fit inputs of shape \(4,\)"):
        q_star(torch.ones(2, 3), torch.ones(4), 0.9)
    with pytest.raises(UsageError, match=r"give a weight \[out, in\] and an input \[in\]"):
        contributions(torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(UsageError, match="none of the 1 layers"):
        layer_qs({}, {}, 0.9, {"one": seen(torch.ones(2), torch.ones(1, 2))})
