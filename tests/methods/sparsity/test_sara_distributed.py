"""SaRA under DDP: what travels, and what is refused. (That results are equal is conformance.)"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core.errors import AttachError
from guywire.testing import run_processes


def net():
    model = nn.Sequential(nn.Linear(20, 30), nn.SiLU(), nn.Linear(30, 4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def refusal(function):
    try:
        function()
    except AttachError as error:
        return str(error)
    return "nothing"


def both(rank):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ddp = nn.parallel.DistributedDataParallel
    model = net()
    sara = gw.SaRA(share=0.1, reselect_at=3)
    vectors = sara.prepare(model)
    wrapped = ddp(model)
    sent = []

    def count(state, bucket):
        sent.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda f: f.value()[0] / 2)

    wrapped.register_comm_hook(None, count)
    wrapped(torch.full((3, 20), rank + 1.0)).square().mean().backward()
    optimizer = torch.optim.SGD(vectors, lr=0.1)
    mesh = init_device_mesh("cpu", (2,))
    sharded = fully_shard(net(), mesh=mesh)
    return {
        "sent": sum(sent),
        "trained": sum(v.numel() for v in vectors),
        "gradient": torch.cat([v.grad for v in vectors if v.grad is not None]),
        "two stages": refusal(lambda: gw.attach(wrapped, optimizer, sara)),
        "wrapped": refusal(lambda: gw.SaRA(share=0.1).prepare(ddp(net()))),
        "sharded": refusal(lambda: gw.SaRA(share=0.1).prepare(sharded)),
    }


@pytest.mark.multiprocess
def test_only_the_chosen_entries_travel():
    one, two = run_processes(both, 2)
    # The entries of all tensors are 10%: 754 numbers in the whole model.
    assert one["sent"] == one["trained"] == 76
    assert torch.equal(one["gradient"], two["gradient"])
    for result in (one, two):
        assert "two stages" in result["two stages"]
        assert "then wrap it" in result["wrapped"]
        assert "sharded by FSDP" in result["sharded"]
