"""Check 5 of mask tuning: what Adam can do to a score in the steps that there are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core.errors import UsageError
from guywire.methods.sparsity.mask_flips import adam_reach

# Check 5.


def test_check_5_too_small_a_sum_of_rates_flips_nothing_whatever_the_gradients():
    rates = [1e-5] * 60
    assert sum(rates) == pytest.approx(6e-4)
    budget = gw.flip_budget(rates)
    assert budget.reach < budget.gap
    assert not budget.possible
    generator = torch.Generator().manual_seed(0)
    scores = nn.Parameter(torch.full((4000,), 0.01, dtype=torch.float64))
    optimizer = torch.optim.Adam([scores], lr=1e-5)
    for step in range(60):
        # All kinds of histories: heavy tails, growing and shrinking sizes, long silences.
        noise = torch.randn(4000, generator=generator, dtype=torch.float64)
        scores.grad = noise.abs().pow(3) * torch.linspace(0.5, 2.0, 4000).pow(step)
        scores.grad[::3] *= float(step > 50)
        optimizer.step()
    assert (scores > 5e-3).all()
    moved = (0.01 - scores.detach()).max().item()
    assert 3e-4 < moved <= budget.reach


def test_check_5_a_steady_gradient_flips_at_the_step_that_the_budget_names():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    scores = gw.mask(model, "weight")["weight"]
    optimizer = torch.optim.Adam([scores], lr=1e-4)
    flipped = None
    for step in range(1, 60):
        optimizer.zero_grad()
        scores.grad = torch.ones_like(scores)
        optimizer.step()
        if flipped is None and gw.mask_report(model).share == 1.0:
            flipped = step
    assert flipped in (50, 51)
    assert gw.flip_budget([1e-4] * 60).steady == 50


def test_the_reach_of_adam_is_attained_by_the_worst_history():
    for steps in (1, 5, 63):
        # Equality in Cauchy-Schwarz: gradients that grow as (b2 / b1)^s.
        scores = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.Adam([scores], lr=1.0, eps=0.0)
        for s in range(steps):
            before = scores.item()
            scores.grad = torch.tensor([(0.999 / 0.9) ** s], dtype=torch.float64)
            optimizer.step()
        assert before - scores.item() == pytest.approx(adam_reach(steps), rel=1e-9)
    assert adam_reach(100_000) == pytest.approx(7.27, abs=5e-3)


@pytest.mark.parametrize("rates", [[-1.0], [float("nan")]])
def test_rates_that_make_no_sense_are_refused(rates):
    with pytest.raises(UsageError, match="step 1"):
        gw.flip_budget(rates)
