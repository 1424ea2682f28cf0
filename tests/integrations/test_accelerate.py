"""Accelerate needs no adapter of ours: attach takes its wrapped optimiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import guywire as gw

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate")

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))


def net():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_loop_with_accumulation_equals_a_plain_loop(accumulation):
    one, two = net(), net()
    anchors = {n: p.detach() + 0.2 for n, p in one.named_parameters()}
    plain = torch.optim.Adam(one.parameters(), lr=0.02)
    for x, y in zip(X.chunk(4), Y.chunk(4), strict=True):
        plain.zero_grad()
        penalty = 0.3 * gw.l2_penalty(dict(one.named_parameters()), anchors)
        (nn.functional.cross_entropy(one(x), y) + penalty).backward()
        plain.step()

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    data = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(data, batch_size=6 // accumulation)
    model, optimizer, loader = accelerator.prepare(
        two, torch.optim.Adam(two.parameters(), lr=0.02), loader
    )
    wires = gw.attach(model, optimizer, gw.L2(0.3, anchor=anchors))
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y) + wires.loss((x, y))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert wires.steps == 4
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
