"""The searches for q and eta: the scan's rules, scores, and models left as they were."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core.errors import UsageError
from guywire.methods.merging import (
    grid_search,
    layer_inputs,
    layer_qs,
    output_change,
    q_star,
    search_eta,
    search_q,
    steady_mean,
    top_logits_change,
)


def test_the_coarse_scan_stops_after_four_values_that_are_no_better():
    tried = []

    def score(value):
        tried.append(value)
        return abs(value - 0.3)

    found = grid_search(score, 0.1, 2.0, 0.1)
    assert found.best == pytest.approx(0.3, abs=1e-9)
    coarse = [round(0.1 + 0.1 * i, 12) for i in range(7)]  # 0.3, and four more: 0.4 to 0.7
    assert tried[:7] == coarse
    # The fine scan begins at 0.3 - 0.09 and ends four values past the best.
    assert tried[7:9] == [0.21, 0.22]
    assert max(tried[7:]) == pytest.approx(0.34)
    assert len(tried) == len(set(tried)) == len(found.scores)  # 0.3 itself is not scored twice


def test_a_scan_stays_in_its_range_and_survives_what_diverges():
    found = grid_search(lambda v: math.nan if v < 0.5 else 1 - v, 0.2, 1.0, 0.1)
    assert found.best == pytest.approx(1.0)
    assert min(found.scores) >= 0.2
    assert max(found.scores) <= 1.0
    assert grid_search(lambda v: v, 0.4, 0.4, 0.1).best == 0.4
    with pytest.raises(UsageError, match=r"every value from 0.1 to 0.3 has the score inf"):
        grid_search(lambda v: math.inf, 0.1, 0.3, 0.1)
    with pytest.raises(UsageError, match=r"nothing to search from 1.0 to 0.5"):
        grid_search(lambda v: v, 1.0, 0.5, 0.1)


def test_the_farthest_mask_does_not_count():
    assert steady_mean([1.0, 2.0, 3.0, 100.0]) == 2.0
    assert steady_mean([1.0, 5.0]) == 3.0
    assert steady_mean([-50.0, 1.0, 3.0]) == 2.0
    assert steady_mean([1.0, 2.0, math.inf]) == math.inf


def task():
    """A linear layer whose change is dense, small, and of one sign: DARE's bad case is q small."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(60, 5)
    base = {n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in layer.named_parameters()}
    tuned = {
        n: p + 0.02 * torch.randn(p.shape, generator=generator) + 0.01 for n, p in base.items()
    }
    layer.load_state_dict(tuned)
    x = torch.randn(256, 60, generator=generator) + 0.5
    return layer, base, tuned, [(x, None)]


def test_output_change_is_the_mean_absolute_difference():
    layer, base, tuned, data = task()
    score = output_change(layer, data)
    assert score(layer) == 0.0
    other = nn.Linear(60, 5)
    other.load_state_dict(base)
    change = (other(data[0][0]) - layer(data[0][0])).detach().abs().mean()
    assert score(other) == pytest.approx(float(change))
    layer.load_state_dict(base)  # the reference was taken before
    assert score(layer) == pytest.approx(float(change))
    squares = output_change(layer, data, read=lambda z: z.square())
    assert squares(layer) == 0.0
    assert squares(other) == 0.0
    with pytest.raises(UsageError, match="no data to compare"):
        output_change(layer, [])
    assert tuned.keys() == base.keys()


def test_top_logits_change_looks_at_the_references_top_only():
    model = nn.Linear(1, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0], [3.0], [2.0], [1.0]]))
    score = top_logits_change(model, [(torch.ones(2, 1), None)], top=2)
    with torch.no_grad():
        model.weight.add_(torch.tensor([[1.0], [3.0], [50.0], [70.0]]))
    assert score(model) == pytest.approx((1 + 9) / 2)


def test_the_searched_q_beats_dare_and_is_near_the_optimum():
    layer, base, tuned, data = task()
    score = output_change(layer, data)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    layer.train()
    found = search_q(layer, base, tuned, 0.9, score, seeds=range(8))
    assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters())
    assert layer.training
    assert found.best > 0.1
    assert found.scores[found.best] < 0.9 * next(iter(found.scores.values()))  # the first is DARE
    # The search minimises absolute, the closed form squared errors: near each other all the same.
    delta = tuned["weight"] - base["weight"]
    closed = q_star(delta, data[0][0], 0.9, tuned["bias"] - base["bias"])
    assert abs(found.best - closed) < 0.15


def test_labels_an_exclusion_and_the_grid_are_passed_on():
    layer, base, tuned, _ = task()
    asked = []

    def score(model):
        asked.append(model.bias.detach().clone())
        return float(model.weight.detach().sub(tuned["weight"]).abs().sum())

    found = search_q(layer, base, tuned, 0.9, score, seeds=[3], step=0.3, high=0.7, exclude="bias")
    assert all(torch.equal(bias, tuned["bias"]) for bias in asked)
    assert max(found.scores) <= 0.7
    assert {0.1, 0.4, 0.7} <= set(found.scores)


def test_eta_gives_every_layer_its_q():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4))
    base = {n: torch.randn(p.shape, generator=generator) * 0.2 for n, p in model.named_parameters()}
    tuned = {
        n: p + 0.02 * torch.randn(p.shape, generator=generator) + 0.02 for n, p in base.items()
    }
    model.load_state_dict(tuned)
    data = [(torch.rand(128, 30, generator=generator), None)]
    inputs = layer_inputs(model, data)
    score = output_change(model, data)
    found = search_eta(model, base, tuned, 0.9, score, inputs)
    qs = layer_qs(base, tuned, 0.9, inputs, eta=found.best)
    assert len({round(q, 6) for q in qs.values()}) == 2
    edited = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4))
    changes = []
    for q in (qs, None):
        values = []
        for seed in range(4):
            edited.load_state_dict(gw.drop_and_rescale(base, tuned, 0.9, q, seed=seed))
            values.append(score(edited))
        changes.append(steady_mean(values))
    assert changes[0] == pytest.approx(found.scores[found.best], rel=1e-6)
    assert changes[0] < changes[1]


def test_a_transposed_parameter_is_edited_and_restored_as_well():
    layer, base, tuned, data = task()
    twin = nn.Linear(60, 5)
    twin.weight = nn.Parameter(tuned["weight"].T.contiguous().T)  # another layout
    twin.bias = nn.Parameter(tuned["bias"].clone())
    found = [
        search_q(m, base, tuned, 0.9, output_change(m, data), seeds=range(4)) for m in (layer, twin)
    ]
    assert not twin.weight.is_contiguous()
    assert torch.equal(twin.weight, tuned["weight"])
    assert list(found[0].scores) == list(found[1].scores)
    assert list(found[0].scores.values()) == pytest.approx(list(found[1].scores.values()), rel=1e-5)


def test_a_model_whose_score_fails_keeps_its_weights():
    layer, base, tuned, _ = task()

    def score(model):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search_q(layer, base, tuned, 0.9, score, seeds=[0])
    assert all(torch.equal(p, tuned[n]) for n, p in layer.named_parameters())


def test_the_score_of_a_q_is_that_of_the_edited_model():
    layer, base, tuned, data = task()
    score = output_change(layer, data)
    found = search_q(layer, base, tuned, 0.8, score, seeds=[7], exclude="bias")
    for q, value in list(found.scores.items())[::7]:
        layer.load_state_dict(gw.drop_and_rescale(base, tuned, 0.8, q, seed=7, exclude="bias"))
        assert score(layer) == pytest.approx(value, rel=1e-6)


def test_tensors_of_another_model_are_refused():
    layer, base, tuned, data = task()
    score = output_change(layer, data)
    with pytest.raises(UsageError, match="'other' has the shape"):
        search_q(layer, {"other": torch.zeros(2)}, {"other": torch.ones(2)}, 0.9, score, seeds=[0])
    assert base.keys() == tuned.keys()
