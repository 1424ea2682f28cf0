"""Exact check 6 of the stability-gap sheet: gradients at a task switch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import guywire as gw
from guywire.diagnostics import gradient_split
from guywire.diagnostics.gradients import split_of


@pytest.fixture
def model():
    layers = nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 5)
    return nn.Sequential(*layers).double()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (16,), generator=generator)


def flat_gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_penalties_and_distillation_have_no_gradient_at_the_switch(model):
    model.eval()
    x, y = batch(0)
    params = gw.select(model)
    anchors = {name: p.detach().clone() for name, p in params.items()}
    importances = {name: torch.rand_like(p) for name, p in params.items()}
    distil = gw.PredictionDistillation()
    distil.setup(model)
    distil.consolidate(model, [(x, y % 3)])  # old classes 0, 1, 2 of five: renormalised over these
    plasticity = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    for stability in (
        lambda: gw.ewc_penalty(params, anchors, importances),
        lambda: distil.loss((x, y), None),
    ):
        split = gradient_split(model, plasticity, stability)
        assert split.stability < 1e-6
        assert split.plasticity > 0.01


def test_the_split_of_replay_is_the_memory_gradient_computed_separately(model):
    (x, y), (mx, my) = batch(0), batch(1)
    plain = copy.deepcopy(model).eval()
    model.eval()
    replay = gw.Replay(strength=1.0, batch_size=16)
    replay.setup(model)
    replay.loss((mx, my), None)
    split = gradient_split(
        model, lambda: F.cross_entropy(model(x), y), lambda: replay.loss((x, y), None)
    )
    g = flat_gradient(F.cross_entropy(plain(x), y), plain)
    h = flat_gradient(F.cross_entropy(plain(mx), my), plain)
    assert split.plasticity == pytest.approx(float(g.norm()), rel=1e-12)
    assert split.stability == pytest.approx(float(h.norm()), rel=1e-12)
    assert split.cosine == pytest.approx(float(F.cosine_similarity(g, h, 0)), rel=1e-9)


@pytest.mark.parametrize("alpha", [0.3, 0.7])
def test_the_parts_add_up_to_the_gradient_of_the_whole(model, alpha):
    model.eval()
    (x, y), (mx, my) = batch(0), batch(1)
    whole = alpha * F.cross_entropy(model(x), y) + (1 - alpha) * F.cross_entropy(model(mx), my)
    g = flat_gradient(F.cross_entropy(model(x), y), model)
    h = flat_gradient(F.cross_entropy(model(mx), my), model)
    torch.testing.assert_close(
        alpha * g + (1 - alpha) * h, flat_gradient(whole, model), rtol=0, atol=1e-6
    )


def test_nothing_of_the_model_changes(model):
    x, y = batch(0)
    model = nn.Sequential(nn.BatchNorm1d(4).double(), model)
    F.cross_entropy(model(x), y).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    gradient_split(model, lambda: F.cross_entropy(model(x), y), lambda: model(x).square().mean())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_without_a_stability_term(model):
    x, y = batch(0)
    for nothing in (lambda: None, lambda: torch.zeros(())):
        split = gradient_split(model, lambda: F.cross_entropy(model(x), y), nothing)
        assert split.stability == 0.0
        assert math.isnan(split.cosine)


def test_selection_limits_the_norm(model):
    w = model[3].bias
    split = gradient_split(
        model, lambda: w.sum() + model[0].bias.sum(), lambda: w.sum(), select="3.*"
    )
    assert split == pytest.approx((5**0.5, 5**0.5, 1.0))


def test_split_of_counts_missing_names_as_zero():
    one = torch.ones(4)
    found = split_of({"a": one, "b": one}, {"a": one})
    assert found == pytest.approx((8**0.5, 2.0, 4 / (8**0.5 * 2)))
