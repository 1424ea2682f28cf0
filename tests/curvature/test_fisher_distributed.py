"""Two gloo processes, each with its own part of the data, equal one with all of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from guywire.core.accumulate import Accumulator
from guywire.core.errors import DataError
from guywire.curvature import diagonal_fisher, output_gram
from guywire.testing import run_processes

pytestmark = pytest.mark.multiprocess

LABELS = ("true", "expected")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 8)
        self.position = nn.Embedding(5, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.block(self.embed(ids) + self.position(torch.arange(5))).mean(1))


def data():
    g = torch.Generator().manual_seed(0)
    return torch.randint(9, (10, 5), generator=g), torch.randint(3, (10,), generator=g)


def parts(rank):
    """Seven samples in three batches for one process, three in a single one for the other."""
    x, y = data()
    if rank == 0:
        return [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:7], y[6:7])]
    return [(x[7:], y[7:])]


class Gathered(Accumulator):
    def __init__(self):
        for name, shape in {"sum": (), "mean": (), "max": (), "cat": (0,)}.items():
            self.declare(f"by_{name}", torch.zeros(shape), name)


def in_two(rank):
    from torch.distributed.fsdp import fully_shard

    found = {}
    ddp = DistributedDataParallel(Model().double())
    for labels in LABELS:
        found[f"ddp-{labels}"] = diagonal_fisher(ddp, parts(rank), labels=labels)
    found["ddp-gram"] = output_gram(ddp, parts(rank))
    model = Model().double()
    for layer in (model.block, model.head):
        fully_shard(layer)
    fully_shard(model)
    # A training step first: it leaves gathered parameters with flags and gradients of their own.
    model(data()[0]).square().mean().backward()
    before = [p.grad.to_local().clone() for p in model.parameters()]
    for labels in LABELS:
        sharded = diagonal_fisher(model, parts(rank), labels=labels)
        found[f"like-{labels}"] = all(
            f.placements == p.placements and f.to_local().shape == p.to_local().shape
            for f, p in zip(sharded.values(), model.parameters(), strict=True)
        )
        found[f"fsdp-{labels}"] = {n: f.full_tensor() for n, f in sharded.items()}
    found["fsdp-gram"] = output_gram(model, parts(rank))
    after = [p.grad.to_local() for p in model.parameters()]
    found["untouched"] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    try:
        diagonal_fisher(model, parts(0) if rank == 0 else [])
        found["empty"] = ""
    except DataError as error:
        found["empty"] = str(error)
    states = Gathered()
    for name in ("sum", "mean", "max"):
        setattr(states, f"by_{name}", torch.tensor(1.0 + rank))
    states.by_cat = torch.arange(rank + 1.0)
    states.reduce()
    found["states"] = states.state_dict()
    return found


@pytest.fixture(scope="module")
def found():
    return run_processes(in_two, 2)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(found, kind, labels):
    expected = diagonal_fisher(Model().double(), [data()], labels=labels)
    for rank in found:
        torch.testing.assert_close(rank[f"{kind}-{labels}"], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_share_products_of_gradients(found, kind):
    expected = output_gram(Model().double(), [data()])
    for rank in found:
        torch.testing.assert_close(rank[f"{kind}-gram"], expected, rtol=1e-9, atol=1e-14)


def test_shards_lie_as_the_parameters_and_gradients_stay(found):
    for rank in found:
        assert rank["like-true"]
        assert rank["like-expected"]
        assert rank["untouched"]


def test_a_process_without_data_is_an_error_on_all(found):
    for rank in found:
        assert "each needs at least one batch" in rank["empty"]


def test_states_reduce_as_declared(found):
    for rank in found:
        states = {name: state.tolist() for name, state in rank["states"].items()}
        assert states == {"by_sum": 3.0, "by_mean": 1.5, "by_max": 2.0, "by_cat": [0.0, 0.0, 1.0]}
