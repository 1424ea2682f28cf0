"""Distillation on two gloo processes: DDP and FSDP2 end where one process ends."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import guywire as gw
from guywire.testing import run_processes

pytestmark = pytest.mark.multiprocess


class Net(nn.Module):
    """The root has parameters of its own, which FSDP2 leaves gathered between forward and backward,
    a buffer that moves, and a noise that only train mode has."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 7)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 7))
        self.head = nn.Linear(7, 6)
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, x):
        h = torch.tanh(self.body(x)) * self.scale + self.offset
        return self.head(h if not self.training else h * 1.25)


def make():
    torch.manual_seed(0)
    return Net().double()


def old_task(rank, count):
    """Alternate classes, so that either process lacks half of the old ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return x[rank::count], (torch.arange(16) % 4)[rank::count]


def batch(seed, rank, count):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x[rank::count], (4 + torch.arange(12) % 3 % 2)[rank::count]


def shard(model, **keywords):
    from torch.distributed.fsdp import fully_shard

    for layer in (model.body, model.head, model):
        fully_shard(layer, **keywords)
    return model


def keep_gathered(model):
    return shard(model, reshard_after_forward=False)


METHODS = {
    "softmax": lambda: gw.PredictionDistillation(3.0),
    "sigmoid": lambda: gw.PredictionDistillation(3.0, kind="sigmoid"),
    "feature": lambda: gw.FeatureDistillation(3.0, layer="head"),
    "feature of another layer": lambda: gw.FeatureDistillation(3.0, layer="body", at="output"),
}
WRAPS = {"ddp": DistributedDataParallel, "shards": shard, "gathered shards": keep_gathered}


def train(method, rank, count=1, wrap=lambda model: model):
    model = make()
    outer = wrap(model)
    optimizer = torch.optim.Adam(outer.parameters(), lr=0.05)
    wires = gw.attach(outer, optimizer, method)
    terms = []
    for step in range(9):
        x, y = batch(step, rank, count)
        optimizer.zero_grad()
        outputs = outer(x)
        term = wires.loss((x, y), outputs if step % 2 else None)
        (F.cross_entropy(outputs, y) + term).backward()
        optimizer.step()
        model.offset.add_(0.125)
        terms.append(float(term))
        if step in (2, 5):
            wires.consolidate([old_task(rank, count)])
    # As one process would see it: terms are means over equal parts of a batch.
    assert model.training
    parameters = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    saved = gw.gathered(wires.state_dict())
    return {"terms": terms, "parameters": parameters, "wires": saved, "offset": model.offset}


def train_llama(rank, count=1):
    """Tied embeddings, blocks run again in backward, and a feature out of the middle."""
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().train()
    checkpointing = "activation_checkpointing_enable"
    if not hasattr(model, checkpointing):  # before transformers 5.23
        checkpointing = "gradient_checkpointing_enable"
    getattr(model, checkpointing)({"use_reentrant": False})
    if count > 1:
        for part in (*model.model.layers, model):
            fully_shard(part)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    middle = gw.FeatureDistillation(0.5, layer="model.layers.0", at="output")
    wires = gw.attach(model, optimizer, [middle, gw.PredictionDistillation(2.0)])
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 60, (4, 9), generator=generator)[rank::count]
        batch = {"input_ids": ids, "labels": ids}
        optimizer.zero_grad()
        outputs = model(**batch)
        term = wires.loss(batch, outputs if step % 2 else None)
        (outputs.loss + term).backward()
        optimizer.step()
        if step == 1:
            wires.consolidate([batch])
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]


def in_two(rank):
    found = {
        name: {how: train(method(), rank, 2, wrap) for how, wrap in WRAPS.items()}
        for name, method in METHODS.items()
    }
    return found | {"llama": train_llama(rank, 2)}


def test_a_sharded_llama_equals_a_whole_one(found_in_two):
    one = train_llama(0)
    for found in found_in_two:
        torch.testing.assert_close(found["llama"], one, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def found_in_two():
    return run_processes(in_two, 2)


@pytest.mark.parametrize("how", WRAPS)
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(found_in_two, name, how):
    one = train(METHODS[name](), 0)
    assert one["terms"][1] == 0.0
    assert min(one["terms"][4], one["terms"][8]) > 0.0
    ranks = [results[name][how] for results in found_in_two]
    means = torch.tensor([r["terms"] for r in ranks], dtype=torch.float64).mean(0)
    torch.testing.assert_close(means, torch.tensor(one["terms"], dtype=torch.float64))
    for found in ranks:
        torch.testing.assert_close(found["parameters"], one["parameters"], rtol=1e-9, atol=1e-10)
        assert found["offset"] == one["offset"]
        state, wanted = (r["wires"]["regularizers"][0]["state"] for r in (found, one))
        assert state["teacher"].keys() == wanted["teacher"].keys() >= {"scale", "offset"}
        torch.testing.assert_close(state["teacher"], wanted["teacher"], rtol=1e-9, atol=1e-10)
        if "old_classes" in wanted:
            assert state["old_classes"].tolist() == wanted["old_classes"].tolist() == [0, 1, 2, 3]
