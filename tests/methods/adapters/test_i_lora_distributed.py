"""I-LoRA on two gloo processes: FSDP2 ends where DDP ends, and one process reads what it saved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import guywire as gw
from guywire.core.tensors import local
from guywire.testing import run_processes

pytestmark = pytest.mark.multiprocess


class Net(nn.Module):
    """The scale after the blocks is the root's own, which FSDP2 leaves gathered until backward."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.scale
        return self.head(x)


def make():
    torch.manual_seed(0)
    model = gw.lora_group(Net().double(), 1, 3, target_modules=["blocks.0", "blocks.1"]).double()
    for name, p in model.named_parameters():
        if "head" in name or "scale" in name:
            p.requires_grad_(True)  # trained beside the adapters, and averaged with them
    return model


def batch(seed, rank=0, count=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    return x[rank::count], torch.randint(4, (12,), generator=generator)[rank::count]


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for layer in (*model.blocks, model):
        fully_shard(layer)
    return model


def shard_and_keep_gathered(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, reshard_after_forward=False)


WRAPS = {
    "ddp": DistributedDataParallel,
    "shards": shard,
    "gathered shards": shard_and_keep_gathered,
}
METHODS = {
    "both losses": {},
    "hidden states alone": {"replay": 0.0, "consistency": "one_sided"},
    "the average alone": {"strength": 0.0},
}


def train(rank, wrap, keywords):
    model = make()
    outer = wrap(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    i_lora = gw.ILoRA(**({"strength": 5.0, "decay": 0.6, "capacity": 9, "seed": rank} | keywords))
    # A teacher's pass comes after I-LoRA's and leaves the root's parameters sharded: a gradient that
    # enters at a block must gather them anew.
    wires = gw.attach(outer, optimizer, [i_lora, gw.PredictionDistillation(0.1)])
    for step in range(8):
        x, y = batch(step, rank, 2)
        optimizer.zero_grad()
        outputs = outer(x)
        (F.cross_entropy(outputs, y) + wires.loss((x, y), outputs)).backward()
        optimizer.step()
        if step in (1, 4):
            wires.consolidate([batch(20 + step, rank, 2)])
    with torch.no_grad():
        fast = outer(batch(50)[0])
        with i_lora.slow(model):
            slow = model(batch(50)[0])
        again = outer(batch(50)[0])
        i_lora.fold()
        folded = outer(batch(50)[0])
    held = sum(local(value).numel() for value in i_lora.slow_.values())
    return {
        "fast": fast, "slow": slow, "again": again, "folded": folded, "held": held,
        "wires": gw.gathered(wires.state_dict()),
    }  # fmt: skip


def in_two(rank):
    return {
        name: {how: train(rank, wrap, keywords) for how, wrap in WRAPS.items()}
        for name, keywords in METHODS.items()
    }


@pytest.fixture(scope="module")
def found_in_two():
    return run_processes(in_two, 2)


@pytest.mark.parametrize("name", METHODS)
def test_shards_end_where_ddp_ends(found_in_two, name):
    for ranks in found_in_two:
        wanted = ranks[name]["ddp"]
        assert not torch.allclose(wanted["slow"], wanted["fast"])
        for how in ("shards", "gathered shards"):
            found = ranks[name][how]
            for key in ("fast", "slow", "folded"):
                torch.testing.assert_close(found[key], wanted[key], rtol=1e-9, atol=1e-10)
            assert torch.equal(found["again"], found["fast"])  # slow() puts everything back
            torch.testing.assert_close(found["slow"], found["folded"])
            state, other = (f["wires"]["regularizers"][0]["state"] for f in (found, wanted))
            torch.testing.assert_close(state["slow"], other["slow"], rtol=1e-9, atol=1e-10)
            assert state["updates"] == other["updates"]


def test_each_process_holds_its_part_and_one_process_goes_on_from_what_they_saved(found_in_two):
    one, two = (ranks["both losses"]["shards"] for ranks in found_in_two)
    assert one["held"] + two["held"] == found_in_two[0]["both losses"]["ddp"]["held"]
    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    i_lora = gw.ILoRA(capacity=9)
    wires = gw.attach(model, optimizer, [i_lora, gw.PredictionDistillation()])
    wires.load_state_dict(one["wires"])
    with torch.no_grad(), i_lora.slow(model):
        # What is frozen is the same for all: the slow values say the rest.
        torch.testing.assert_close(model(batch(50)[0]), one["slow"], rtol=1e-9, atol=1e-10)
