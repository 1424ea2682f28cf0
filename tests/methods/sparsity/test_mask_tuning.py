"""The exact checks of mask tuning, in plain loops; masks themselves are in test_masks.py."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import guywire as gw
from guywire.core.errors import SelectionError, UsageError
from guywire.methods.sparsity.mask_tuning import (
    gradient_dropout,
    keep_probability,
    prediction_drift,
)
from guywire.methods.sparsity.masks import masks_of

_spec = importlib.util.spec_from_file_location(
    "mask_bench", Path(__file__).with_name("mask_bench.py")
)
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)
batches_of, equal_scores, masked, small, train = (
    bench.batches_of, bench.equal_scores, bench.masked, bench.small, bench.train,
)  # fmt: skip

# Check 1.


def test_check_1_at_the_start_the_model_is_the_original_and_nothing_is_off():
    plain, (model, scores) = small(), masked()
    (batch,) = batches_of(1)
    logits = model(batch[0])
    assert torch.equal(logits, plain(batch[0]))
    drift = prediction_drift(logits, plain(batch[0]))
    for grad in torch.autograd.grad(drift, list(scores.values())):
        assert grad.abs().max() < 1e-15
    report = gw.mask_report(model)
    assert report.share == 0.0
    assert all(on.all() for on in masks_of(model).values())


# Check 3.


@pytest.mark.parametrize(
    ("task", "original", "wanted"),
    [(2, 3, 1), (2, -2, 0.5), (1, -3, 0.25), (-1, 3, 0.25), (5, 0, 1), (-5, 0, 1), (-2, -9, 1)],
)
def test_check_3_probability_of_known_pairs(task, original, wanted):
    found = keep_probability(torch.tensor(float(task)), torch.tensor(float(original)))
    assert found.item() == wanted


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-30])
def test_check_3_probability_of_a_million_pairs_is_one_and_never_a_coin_flip(scale):
    generator = torch.Generator().manual_seed(0)
    a, b = scale * torch.randn(2, 1_000_000, generator=generator)
    p = keep_probability(a, b)
    assert p.min() >= 0.0
    assert p.max() <= 1.0
    agree = a.sign() == b.sign()
    assert p[agree].min() == 1.0
    against = ~agree
    closed = (a.abs() / (a.abs() + b.abs()))[against]
    torch.testing.assert_close(p[against], closed, rtol=0, atol=1e-6)


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(0, 0.999), st.floats(0, 1))
def test_the_kept_gradient_is_the_tasks_times_one_or_one_less_strength(a, b, u, strength):
    task, original, uniform = (torch.tensor(v, dtype=torch.float64) for v in (a, b, u))
    g = gradient_dropout(task, original, uniform, strength).item()
    assert g in (pytest.approx(a), pytest.approx((1 - strength) * a))
    # What the original says never enters the update: only which of the two it is.
    assert abs(g) <= abs(a) + 1e-12


# Check 4.


def test_check_4_without_strength_it_is_plain_mask_training():
    plain, held = masked(), masked()
    data = batches_of(40)
    train(*plain, data)
    train(*held, data, gw.MaskTuning(0.0, norm=0.0))
    assert equal_scores(plain[1], held[1])
    assert gw.mask_report(held[0]).share > 0.0


def test_check_4_the_norm_term_is_the_sum_of_unsquared_norms():
    model, scores = masked()
    optimizer = torch.optim.Adam(scores.values(), lr=1e-3)
    (batch,) = batches_of(1)
    with gw.attach(model, optimizer, gw.MaskTuning(0.0, norm=0.5)) as wires:
        term = wires.loss(batch, None)
    assert term.item() == pytest.approx(0.5 * 0.01 * ((6 * 16) ** 0.5 + (16 * 3) ** 0.5))
    term.backward()
    for p in scores.values():  # m / |m|
        torch.testing.assert_close(p.grad, 0.5 * p.detach() / p.detach().norm())


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("pair", [(1.0, -3.0), (2.0, -2.0), (-3.0, 1.0), (1.0, 4.0)])
def test_check_4_kept_fraction_and_mean_match_the_probability(pair, strength):
    n = 100_000
    task, original = (torch.full((n,), v, dtype=torch.float64) for v in pair)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g = gradient_dropout(task, original, uniform, strength)
    p = keep_probability(task, original)[0].item()
    kept = (g == task).double().mean().item()
    error = 4 * (p * (1 - p) / n) ** 0.5
    assert abs(kept - p) <= error
    mean = ((1 - strength) + strength * p) * pair[0]
    assert abs(g.mean().item() - mean) <= abs(pair[0]) * strength * error + 1e-12


# Check 8.


def test_check_8_only_scores_move_and_only_scores_have_gradients():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
        )
    model.double().eval()
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    scores = gw.mask(model, ["0.weight", "4.weight"])
    train(model, scores, batches_of(30), gw.MaskTuning(), lr=2e-3)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        f"{layer}.parametrizations.weight.0.scores" for layer in (0, 4)
    }
    assert gw.mask_report(model).share > 0.0
    after = gw.unmask(model).state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


# Check 9.


def test_check_9_the_best_of_all_masks_is_found_on_a_sign_consistent_toy():
    weight = torch.tensor([[1.0, -2.0, 1.5]], dtype=torch.float64)
    best = torch.tensor([[True, False, True]])
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x @ (weight * best).T

    def loss_of(on):
        return ((x @ (weight * on).T - y) ** 2).mean().item()

    every = {bits: loss_of(torch.tensor([bits])) for bits in itertools.product((0, 1), repeat=3)}
    least = min(every, key=every.get)
    assert least == (1, 0, 1)
    # Sign-consistent: from any mask the gradient of each score points to the best one.
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weight)
    scores = gw.mask(model, "weight")["weight"]
    optimizer = torch.optim.Adam([scores], lr=1e-4)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.equal(masks_of(model)["weight"], best)
    assert min(losses) >= every[least]
    assert losses[-1] == every[least]


# Check 10 (the processes are real in the conformance suite).


def test_check_10_the_same_seed_gives_the_same_masks_and_another_seed_others():
    runs = []
    for seed in (0, 0, 1):
        model, scores = masked()
        train(model, scores, batches_of(40), gw.MaskTuning(seed=seed))
        runs.append(scores)
    assert equal_scores(runs[0], runs[1])
    assert not equal_scores(runs[0], runs[2])


def test_check_10_gating_reduced_gradients_is_not_gating_local_ones():
    generator = torch.Generator().manual_seed(0)
    task, original = torch.randn(2, 2, 5000, generator=generator, dtype=torch.float64)
    uniform = torch.rand(5000, generator=generator, dtype=torch.float64)
    whole = gradient_dropout(task.mean(0), original.mean(0), uniform)
    local = torch.stack(
        [gradient_dropout(a, b, uniform) for a, b in zip(task, original, strict=True)]
    ).mean(0)
    assert not torch.allclose(whole, local)


# The gradient that gates.


def by_hand(model, scores, data, strength, norm, seed, lr=1e-3, pieces=1):
    """Mask tuning with two backward passes and a frozen copy, as the sheet's algorithm says."""
    import numpy as np

    original = gw.unmask(copy.deepcopy(model)).requires_grad_(False)
    optimizer = torch.optim.Adam(scores.values(), lr=lr)
    params = list(scores.values())
    for step, (x, y) in enumerate(data):
        logits = model(x)
        loss = F.cross_entropy(logits, y) + norm * sum(p.norm() for p in params)
        drift = F.kl_div(
            logits.log_softmax(-1), original(x).log_softmax(-1), log_target=True,
            reduction="batchmean",
        )  # fmt: skip
        backward = torch.autograd.grad(drift, params, retain_graph=True)
        optimizer.zero_grad()
        loss.backward()
        state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]) >> 1)
        for p, other in zip(params, backward, strict=True):
            agree = p.grad.sign() == other.sign()
            share = p.grad.abs() / (p.grad.abs() + other.abs())
            keep = torch.where(agree, 1.0, share) > torch.rand(p.shape, generator=generator)
            p.grad = torch.where(keep, 1.0, 1.0 - strength) * p.grad
        optimizer.step()


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_plain_loop_equals_the_algorithm_by_hand(strength, pieces):
    mine, theirs = masked(), masked()
    data = batches_of(30)
    train(*mine, data, gw.MaskTuning(strength, norm=1e-3, seed=5), pieces=pieces)
    by_hand(*theirs, data, strength, 1e-3, 5)
    for name, value in theirs[1].items():
        torch.testing.assert_close(mine[1][name], value, rtol=0, atol=1e-10)
    assert 0.0 < gw.mask_report(mine[0]).share < 1.0


def test_dropout_keeps_predictions_nearer_to_the_original():
    (batch,) = batches_of(1, size=200, seed=9)
    drifts = []
    for strength in (0.0, 1.0):
        model, scores = masked()
        train(model, scores, batches_of(60), gw.MaskTuning(strength, norm=0.0))
        with torch.no_grad():
            start = small()(batch[0])
            drifts.append(
                (prediction_drift(model(batch[0]), start) - prediction_drift(start, start)).item()
            )
    assert drifts[1] < drifts[0]


# Errors.


def test_a_loop_that_forgets_the_loss_is_told_so():
    model, scores = masked()
    optimizer = torch.optim.Adam(scores.values(), lr=1e-3)
    (batch,) = batches_of(1)
    gw.attach(model, optimizer, gw.MaskTuning())
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    with pytest.raises(UsageError, match=r"wires\.loss"):
        optimizer.step()


def test_a_model_without_masks_is_refused():
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(SelectionError, match=r"gw\.mask"):
        gw.attach(model, optimizer, gw.MaskTuning())


@pytest.mark.parametrize("wrong", [{"strength": 1.5}, {"norm": -1.0}, {"temperature": 0.0}])
def test_arguments_that_make_no_sense_are_refused(wrong):
    model, scores = masked()
    optimizer = torch.optim.Adam(scores.values())
    with pytest.raises(UsageError):
        gw.attach(model, optimizer, gw.MaskTuning(**wrong))
