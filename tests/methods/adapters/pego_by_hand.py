"""PEGO's terms with full matrices, and a small model: what the tests of PEGO compare with."""

from __future__ import annotations

import torch
from torch import nn

import guywire as gw
from guywire.methods.adapters._lora import sites

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def group(n=3, r=4, out=32, wide=32, seed=0):
    As = [normal(r, wide, seed=10 * seed + 2 * i + 1) for i in range(n)]
    Bs = [normal(out, r, seed=10 * seed + 2 * i + 2) for i in range(n)]
    return As, Bs


def entries(matrix, norm):
    return matrix.abs().sum() if norm == "l1" else matrix.square().sum()


def dense_preserve(base, As, Bs, norm="l1", side="input"):
    updates = [b @ a for a, b in zip(As, Bs, strict=True)]
    return sum(entries(base @ d.T if side == "input" else base.T @ d, norm) for d in updates)


def dense_diversify(As, Bs, norm="l1", side="input"):
    updates = [b @ a for a, b in zip(As, Bs, strict=True)]
    total = torch.zeros((), dtype=As[0].dtype)
    for i in range(len(updates)):
        for j in range(i + 1, len(updates)):
            one, two = updates[i], updates[j]
            total = total + entries(one @ two.T if side == "input" else one.T @ two, norm)
    return total


def gradients(function, As, Bs):
    leaves = [t.clone().requires_grad_() for t in (*As, *Bs)]
    value = function(leaves[: len(As)], leaves[len(As) :])
    return value.detach(), torch.autograd.grad(value, leaves)


class Tower(nn.Module):
    """Two blocks with queries and values of their own, small and in float64."""

    def __init__(self, width=12, classes=3):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(width, width), "v": nn.Linear(width, width)})
            for _ in range(2)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["v"](torch.tanh(block["q"](x)))
        return self.head(x)


def tower(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Tower().double()


def stirred(n=3, r=2, scale=0.3, **more):
    model = gw.lora_group(tower(), n, r, target_modules=["q", "v"], **more).double()
    with torch.no_grad():
        for i, site in enumerate(sites(model)):
            site.B.copy_(scale * normal(*site.B.shape, seed=i + 30))
    return model


def by_layer(model):
    layers = {}
    for site in sites(model):
        layers.setdefault(site.name, []).append(site)
    return list(layers.values())


def by_hand(model, norm="l1", side="input", preserve=1.0, diversify=1.0):
    total = 0.0
    for found in by_layer(model):
        base, As = found[0].base, [s.A for s in found]
        Bs = [s.scaling * s.B for s in found]
        total = total + preserve * dense_preserve(base, As, Bs, norm, side)
        total = total + diversify * dense_diversify(As, Bs, norm, side)
    return total


def factors(model):
    return [p for s in sites(model) for p in (s.A, s.B)]
