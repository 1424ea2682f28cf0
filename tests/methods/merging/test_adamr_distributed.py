"""AdamR on two processes: its divisor is over all shards, at one collective call a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import guywire as gw
from guywire.testing import run_processes

pytestmark = pytest.mark.multiprocess


def net():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        # 7 and 5 rows do not divide by two processes: one shard is larger.
        return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def anchors():
    generator = torch.Generator().manual_seed(9)
    return {
        n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in net().named_parameters()
    }


def train(model, share):
    from torch.distributed.tensor.debug import CommDebugMode

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    regularizer = gw.AdamR(0.05, anchor=anchors())
    calls, divisors = 0, []
    with gw.attach(model, optimizer, regularizer) as wires:
        for step in range(10):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
            y = torch.randint(5, (8,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(share(x)), share(y)).backward()
            with CommDebugMode() as mode:
                optimizer.step()
            calls += mode.get_total_counts()
            divisors.append(regularizer.rms_)
        value = float(wires.penalty())
    state = {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for n, p in model.named_parameters()
    }
    names = [n.removeprefix("module.") for n in state]
    return {
        "state": dict(zip(names, state.values(), strict=True)),
        "calls": calls,
        "rms": divisors,
        "penalty": value,
    }


def in_two(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def share(t):
        return t.chunk(2)[rank]

    sharded = net()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    return {
        "ddp": train(DistributedDataParallel(net()), share),
        "fsdp2": train(sharded, share),
    }


@pytest.fixture(scope="module")
def ranks():
    return run_processes(in_two, 2, timeout=120.0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(ranks, kind):
    alone = train(net(), lambda t: t)
    for result in (r[kind] for r in ranks):
        for name, value in alone["state"].items():
            torch.testing.assert_close(value, result["state"][name], rtol=1e-9, atol=1e-9)
        assert result["rms"] == pytest.approx(alone["rms"], rel=1e-9)
        assert result["penalty"] == pytest.approx(alone["penalty"], rel=1e-9)


def test_a_step_on_shards_costs_one_collective_call(ranks):
    assert [r["fsdp2"]["calls"] for r in ranks] == [10, 10]
    assert [r["ddp"]["calls"] for r in ranks] == [0, 0]
