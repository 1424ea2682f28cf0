"""A small masked network, data and a plain loop, for the tests of mask tuning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import guywire as gw


def small(dtype=torch.float64, seed=0):
    """A network whose weights stand for pretrained ones."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def batches_of(count, size=12, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def train(model, scores, data, term=None, *, lr=1e-3, pieces=1, scaler=None, fused=None):
    """Adam on the scores; returns the wires' regularizer state's trajectory of masks."""
    optimizer = torch.optim.Adam(scores.values(), lr=lr, fused=fused)
    wires = None if term is None else gw.attach(model, optimizer, term)
    for x, y in data:
        optimizer.zero_grad()
        for part in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            outputs = model(part[0])
            loss = F.cross_entropy(outputs, part[1])
            if wires is not None:
                loss = loss + wires.loss(part, outputs)
            loss = loss / pieces
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    if wires is not None:
        wires.detach()


def masked(dtype=torch.float64, **options):
    model = small(dtype)
    return model, gw.mask(model, "*.weight", **options)


def equal_scores(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)
