"""DDP and FSDP2 on two gloo processes equal one process, and penalties do not communicate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.testing import run_processes

pytestmark = pytest.mark.multiprocess

STEPS = 50


def net():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        # 7 and 5 rows do not divide by two processes: one shard is larger.
        return nn.Sequential(
            nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
        )


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator)
    return x, torch.randint(3, (8,), generator=generator)


def known():
    """Means and importances that each process knows in full."""
    generator = torch.Generator().manual_seed(9)
    params = dict(net().named_parameters())
    mean = {
        n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for n, p in params.items()
    }
    precision = {n: torch.rand(p.shape, generator=generator) for n, p in params.items()}
    return {"mean": mean, "precision": precision, "tasks": 1}


def make(kind):
    if kind == "none":
        return []
    if kind == "L2":
        return [gw.L2(0.3, anchor=known()["mean"])]
    if kind == "L1 decoupled":
        return [gw.L1(0.1, anchor=known()["mean"], decoupled=True)]
    return [gw.EWC(2.0)]


def train(model, kind, share):
    """50 Adam steps; returns values of the penalty and the collective calls inside step()."""
    from torch.distributed.tensor.debug import CommDebugMode

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    wires = gw.attach(model, optimizer, make(kind))
    if kind.startswith("EWC"):
        for regularizer in wires.regularizers:
            regularizer.load_state_dict(known())
        if kind == "EWC estimated":
            wires.consolidate([tuple(map(share, data(100 + i))) for i in range(2)])
    values, calls = [], 0
    for step in range(STEPS):
        if step == 10:  # an evaluation leaves FSDP2's root whole: the step must not mind
            with torch.no_grad():
                model(share(data(0)[0]))
        optimizer.zero_grad()
        x, y = map(share, data(step))
        nn.functional.cross_entropy(model(x), y).backward()
        if step == 20:
            with torch.no_grad():
                model(share(data(0)[0]))
        with CommDebugMode() as mode:
            optimizer.step()
        calls += mode.get_total_counts()
        if step % 10 == 9:
            values.append(float(wires.penalty()))
    return values, calls


def remote(rank, kinds, ways):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def half(t):
        return t.chunk(2)[rank]

    results = {}
    for kind in kinds:
        for way in ways:
            model = net()
            wrapped = model
            if way == "ddp":
                wrapped = nn.parallel.DistributedDataParallel(model)
            else:
                mesh = init_device_mesh("cpu", (2,))
                for part in (model[0], model[2], model):
                    fully_shard(part, mesh=mesh)
            values, calls = train(wrapped, kind, half)
            state = {}
            for name, value in model.state_dict().items():
                state[name] = value.full_tensor() if hasattr(value, "full_tensor") else value
            results[f"{way} {kind}"] = {"values": values, "calls": calls, "state": state}
    return results


KINDS = ["none", "L2", "L1 decoupled", "EWC", "EWC estimated"]
WAYS = ["ddp", "fsdp2"]


@pytest.fixture(scope="module")
def two():
    return run_processes(remote, 2, timeout=240, kinds=KINDS, ways=WAYS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(two, kind, way):
    model = net()
    values, _ = train(model, kind, lambda t: t)
    for result in two:
        found = result[f"{way} {kind}"]
        assert found["values"] == pytest.approx(values, rel=1e-4, abs=1e-9)
        for name, p in model.state_dict().items():
            torch.testing.assert_close(found["state"][name], p, rtol=0, atol=1e-6)
    if kind != "none":
        assert min(values) > 0.0


@pytest.mark.parametrize("way", WAYS)
def test_no_collective_call_in_the_step(two, way):
    for result in two:
        for kind in KINDS:
            assert result[f"{way} {kind}"]["calls"] == result[f"{way} none"]["calls"] == 0


def test_the_penalty_acts(two):
    plain, held = (two[0][f"fsdp2 {kind}"]["state"] for kind in ("none", "L2"))
    assert not torch.allclose(plain["0.weight"], held["0.weight"], atol=1e-3)


def counted(rank):
    """That CommDebugMode does see a collective call inside an optimiser's step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    class Talking(gw.Regularizer):
        def before_step(self, step):
            for p in step.optimizer.param_groups[0]["params"]:
                p.full_tensor()

    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gw.attach(model, optimizer, Talking())
    model(torch.ones(2, 4)).sum().backward()
    with CommDebugMode() as mode:
        optimizer.step()
    whole = gw.L2(0.5, anchor={"weight": torch.zeros(4, 4)})
    with gw.attach(model, optimizer, whole) as wires:
        value = wires.penalty()
        wanted = 0.5 * model.weight.full_tensor().square().sum()
    return {
        "calls": mode.get_total_counts(),
        "value": value,
        "wanted": wanted.detach(),
        "local": list(whole.anchors_["weight"].to_local().shape),
    }


def test_the_count_counts_and_given_anchors_are_sharded():
    for result in run_processes(counted, 2):
        assert result["calls"] == 2
        torch.testing.assert_close(result["value"], result["wanted"])
        assert result["local"] == [2, 4]
