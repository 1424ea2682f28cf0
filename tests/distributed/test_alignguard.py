"""AlignGuard-LoRA under DDP and FSDP2 on two gloo processes equals one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.testing import run_processes

pytestmark = pytest.mark.multiprocess


def net():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        # 7 and 5 rows do not divide by two processes: one shard is larger.
        model = nn.Sequential(
            nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
        ).double()
    return gw.lora_group(model, 2, 3, target_modules=["0", "2"]).double()


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (8,), generator=generator)


def train(model, share, strength):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    values = []
    regularizer = gw.AlignGuardLoRA(strength, collision=1.0, large="weight")
    with gw.attach(model, optimizer, regularizer) as wires:
        wires.consolidate([tuple(map(share, data(step))) for step in (100, 101)])
        for step in range(12):
            optimizer.zero_grad()
            x, y = map(share, data(step))
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            values.append(float(wires.penalty()))
    return values


def remote(rank, strength):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    results = {}
    for way in ("ddp", "fsdp2"):
        model = net()
        wrapped = model
        if way == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (2,))
            for part in (model[0], model[2], model):
                fully_shard(part, mesh=mesh)
        values = train(wrapped, lambda t: t.chunk(2)[rank], strength)
        state = {}
        for name, value in model.state_dict().items():
            state[name] = value.full_tensor() if hasattr(value, "full_tensor") else value
        results[way] = {"values": values, "state": state}
    return results


def test_two_processes_equal_one():
    alone, free = net(), net()
    values = train(alone, lambda t: t, 5.0)
    train(free, lambda t: t, 0.0)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(
        alone.parameters(), free.parameters(), strict=True))  # fmt: skip
    for rank in run_processes(remote, 2, timeout=120, strength=5.0):
        for way in ("ddp", "fsdp2"):
            assert rank[way]["values"] == pytest.approx(values, rel=1e-8), way
            for name, value in alone.state_dict().items():
                torch.testing.assert_close(
                    rank[way]["state"][name], value, rtol=1e-8, atol=1e-8,
                    msg=lambda m, n=f"{way} {name}": f"{n}: {m}",
                )  # fmt: skip
