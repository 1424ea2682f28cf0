from __future__ import annotations

import pytest
import torch
from torch import nn

from guywire.core.processes import data_parallel, everyones, is_sharded
from guywire.testing import run_processes


def test_without_processes():
    model = nn.Linear(2, 2)
    assert data_parallel(model) is None
    assert data_parallel(None) is None
    assert not is_sharded(model)
    assert everyones([3, 1], model) == {1, 3}


def in_two(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    ddp = DistributedDataParallel(nn.Linear(2, 2))
    shards = fully_shard(nn.Linear(2, 2))
    with torch.no_grad():
        shards(torch.zeros(1, 2))  # the root's parameters are whole now
    return {
        "ddp": data_parallel(ddp) is ddp,
        "compiled": data_parallel(torch.compile(ddp)) is ddp,
        "compiled inside": data_parallel(torch.compile(nn.Linear(2, 2))) is None,
        "gathered": not any(hasattr(p, "device_mesh") for p in shards.parameters()),
        "sharded": [is_sharded(m) for m in (nn.Sequential(shards), ddp)],
        "of each": sorted(everyones([rank], nn.Linear(2, 2))),
        "of all": [sorted(everyones([7, rank], m)) for m in (ddp, torch.compile(ddp), shards)],
    }


@pytest.mark.multiprocess
def test_two_processes():
    for rank, found in enumerate(run_processes(in_two, 2)):
        assert found["ddp"]
        assert found["compiled"]
        assert found["compiled inside"]
        assert found["gathered"]
        assert found["sharded"] == [True, False]
        assert found["of each"] == [rank]  # processes that train models of their own stay alone
        assert found["of all"] == [[0, 1, 7]] * 3
