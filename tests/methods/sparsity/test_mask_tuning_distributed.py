"""Mask tuning in two gloo processes: together under DDP, each alone with a model of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import guywire as gw
from guywire.testing import run_processes

pytestmark = pytest.mark.multiprocess


def train(rank, count, wrap=lambda model: model):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    scores = gw.mask(model, "*.weight")
    outer = wrap(model)
    optimizer = torch.optim.SGD(scores.values(), lr=0.5)
    wires = gw.attach(outer, optimizer, gw.MaskTuning(strength=0.7, seed=3))
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 4, generator=generator, dtype=torch.float64)[rank::count]
        y = torch.randint(3, (12,), generator=generator)[rank::count]
        optimizer.zero_grad()
        outputs = outer(x)
        (F.cross_entropy(outputs, y) + wires.loss((x, y), outputs)).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in scores.items()}


def in_two(rank):
    def compiled(model):
        return torch.compile(DistributedDataParallel(model), backend="eager")

    return {
        "ddp": train(rank, 2, DistributedDataParallel),
        "compiled": train(rank, 2, compiled),
        "alone": train(rank, 2),
    }


@pytest.fixture(scope="module")
def found_in_two():
    return run_processes(in_two, 2)


@pytest.mark.parametrize("how", ["ddp", "compiled"])
def test_together_they_end_where_one_process_ends(found_in_two, how):
    wanted = train(0, 1)
    for found in found_in_two:
        torch.testing.assert_close(found[how], wanted, rtol=1e-9, atol=1e-12)


def test_processes_with_models_of_their_own_know_nothing_of_each_other(found_in_two):
    for rank, found in enumerate(found_in_two):
        wanted = train(rank, 2)
        for name, value in found["alone"].items():
            assert torch.equal(value, wanted[name])
    one, two = (found["alone"] for found in found_in_two)
    assert any(not torch.equal(one[name], two[name]) for name in one)
