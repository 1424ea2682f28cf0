"""Replay, GEM and distillation on two gloo processes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import guywire as gw
from guywire.core.errors import AttachError
from guywire.testing import run_processes

pytestmark = pytest.mark.multiprocess


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()


def batch(seed, size=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(6, (size,), generator=generator)


def part(data, rank, count):
    return tuple(t[rank::count] for t in data)


def train_gem(rank, count=1):
    model = make()
    outer = model if count == 1 else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    gem = gw.GEM(16 // count, margin=0.1)
    wires = gw.attach(outer, optimizer, gem)
    violated = 0
    for task in (1, 2):
        wires.consolidate([part(batch(task), rank, count)])
    for step in range(8):
        x, y = part(batch(10 + step % 2), rank, count)
        optimizer.zero_grad()
        F.cross_entropy(outer(x), y).backward()
        optimizer.step()
        violated += gem.violated_
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"parameters": flat, "violated": violated}


def in_two(rank):
    """All that needs two processes, so that they start once."""
    return {
        "gem": train_gem(rank, 2),
        "shards": refuse_and_replay_on_shards(rank),
        "replay": train_replay_in_two(rank),
    }


@pytest.fixture(scope="module")
def found_in_two():
    return run_processes(in_two, 2)


def test_gem_under_ddp_equals_one_process(found_in_two):
    one = train_gem(0)
    assert one["violated"] > 0
    for found in [results["gem"] for results in found_in_two]:
        assert found["violated"] == one["violated"]
        torch.testing.assert_close(found["parameters"], one["parameters"], rtol=1e-9, atol=1e-11)


def refuse_and_replay_on_shards(rank):
    from torch.distributed.fsdp import fully_shard

    model = make()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    words = []
    for method in (gw.PredictionDistillation(), gw.FeatureDistillation(), gw.GEM()):
        try:
            with gw.attach(model, optimizer, method) as wires:
                wires.consolidate([batch(1)])
        except AttachError as error:
            words.append(str(error))
    wires = gw.attach(model, optimizer, gw.Replay(16, seed=rank))
    for step in range(4):
        x, y = part(batch(step), rank, 2)
        outputs = model(x)
        optimizer.zero_grad()
        (F.cross_entropy(outputs, y) + wires.loss((x, y), outputs)).backward()
        optimizer.step()
    flat = torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()])
    return {"words": words, "parameters": flat}


def test_under_fsdp2_replay_works_and_the_others_say_why_not(found_in_two):
    one, two = (results["shards"] for results in found_in_two)
    assert len(one["words"]) == 3
    assert all("fully_shard" in w or "sharded" in w for w in one["words"])
    assert torch.equal(one["parameters"], two["parameters"])
    assert torch.isfinite(one["parameters"]).all()
    # Replay changed the path: the same run without it ends elsewhere.
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
    plain = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert not torch.allclose(plain, one["parameters"])


def train_replay_in_two(rank):
    model = make()
    outer = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    distil = gw.PredictionDistillation()
    wires = gw.attach(outer, optimizer, [gw.Replay(16, seed=rank), distil])
    wires.consolidate([part(batch(1), rank, 2)])
    for step in range(4):
        x, y = part(batch(step), rank, 2)
        outputs = outer(x)
        optimizer.zero_grad()
        (F.cross_entropy(outputs, y) + wires.loss((x, y), outputs)).backward()
        optimizer.step()
    return {"parameters": torch.cat([p.detach().flatten() for p in model.parameters()])}


def test_under_ddp_replay_and_distillation_keep_processes_alike(found_in_two):
    one, two = (results["replay"] for results in found_in_two)
    assert torch.equal(one["parameters"], two["parameters"])
