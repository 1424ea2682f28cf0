"""Replay, GEM and distillation on two gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import CheckpointError
from guywire.testing import run_processes

pytestmark = pytest.mark.multiprocess


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6)).double()


def batch(seed, size=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(6, (size,), generator=generator)


def part(data, rank, count):
    return tuple(t[rank::count] for t in data)


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    return model


def compiled(model):
    return torch.compile(DistributedDataParallel(model), backend="eager")


def whole(model):
    parts = (getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters())
    return torch.cat([p.detach().flatten() for p in parts])


def train_gem(rank, count=1, wrap=lambda model: model):
    model = make()
    outer = wrap(model)
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.5)
    gem = gw.GEM(16 // count, margin=0.1)
    wires = gw.attach(outer, optimizer, gem)
    noted = []
    for task in (1, 2):
        wires.consolidate([part(batch(task), rank, count)])
    for step in range(8):
        x, y = part(batch(10 + step % 2), rank, count)
        optimizer.zero_grad()
        F.cross_entropy(outer(x), y).backward()
        optimizer.step()
        noted.append([gem.violated_, gem.stability_norm_, gem.cosine_])
    return {"parameters": whole(model), "noted": torch.tensor(noted, dtype=torch.float64)}


def in_two(rank):
    """All that needs two processes, so that they start once."""
    return {
        "gem": train_gem(rank, 2, DistributedDataParallel),
        "compiled gem": train_gem(rank, 2, compiled),
        "sharded gem": train_gem(rank, 2, shard),
        "shards": train_replay_on_shards(rank),
        "replay": train_replay_in_two(rank),
    }


@pytest.fixture(scope="module")
def found_in_two():
    return run_processes(in_two, 2)


@pytest.mark.parametrize("how", ["gem", "compiled gem", "sharded gem"])
def test_gem_in_two_processes_equals_one(found_in_two, how):
    one = train_gem(0)
    assert one["noted"][:, 0].max() > 0
    for found in [results[how] for results in found_in_two]:
        for key, value in one.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-9, atol=1e-11, equal_nan=True, check_device=False
            )


def train_replay_on_shards(rank):
    model = shard(make())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wires = gw.attach(model, optimizer, gw.Replay(16, seed=rank))
    for step in range(4):
        x, y = part(batch(step), rank, 2)
        outputs = model(x)
        optimizer.zero_grad()
        (F.cross_entropy(outputs, y) + wires.loss((x, y), outputs)).backward()
        optimizer.step()
    return {"parameters": whole(model)}


def save_and_go_on(rank, folder):
    """Replay and L2 on shards; through, and again from what each process saved half-way."""
    path = Path(folder) / f"{rank}.safetensors"

    def run(start, stop, model=None):
        model = shard(make()) if model is None else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wires = gw.attach(model, optimizer, [gw.L2(0.3), gw.Replay(8, seed=rank)])
        if start:
            wires.load_state_dict(checkpoint.load(path))
        for step in range(start, stop):
            x, y = part(batch(step), rank, 2)
            outputs = model(x)
            optimizer.zero_grad()
            (F.cross_entropy(outputs, y) + wires.loss((x, y), outputs)).backward()
            optimizer.step()
        return model, wires

    through, _ = run(0, 6)
    half, wires = run(0, 3)
    refusals = []
    for save in (
        lambda: checkpoint.save(path, wires.state_dict()),
        lambda: gw.sharded_state(wires).state_dict(),
    ):
        try:
            save()
        except CheckpointError as error:
            refusals.append(str(error))
    checkpoint.save(path, gw.gathered(wires.state_dict()))
    wires.detach()
    again, _ = run(3, 6, half)
    return {"through": whole(through), "again": whole(again), "refusals": refusals}


def test_each_process_saves_its_memory_beside_whole_anchors_and_goes_on(tmp_path):
    for found in run_processes(save_and_go_on, 2, folder=str(tmp_path)):
        assert torch.equal(found["again"], found["through"])
        assert len(found["refusals"]) == 2
        assert all("gw.gathered(" in words for words in found["refusals"])


def test_under_fsdp2_replay_works(found_in_two):
    one, two = (results["shards"] for results in found_in_two)
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
