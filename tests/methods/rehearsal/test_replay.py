from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import guywire as gw
from guywire.core import checkpoint
from guywire.core.errors import UsageError


def make(dropout=0.2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 6))


def batch(step, size=8, low=0, high=6):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 4, generator=generator)
    return x, torch.randint(low, high, (size,), generator=generator)


def attach(model, regularizer):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return gw.attach(model, optimizer, regularizer), optimizer


def train(model, wires, optimizer, steps):
    for step in steps:
        x, y = batch(step)
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        if wires is not None:
            loss = loss + wires.loss((x, y), outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_memory_is_drawn_before_the_new_batch_goes_in():
    model = make(0.0).eval()
    replay = gw.Replay(4, strength=0.5)
    wires, _ = attach(model, replay)
    assert float(wires.loss(batch(0, 4), None)) == 0.0
    assert len(replay.buffer_) == 4
    x, y = batch(0, 4)
    # All four are drawn, in whatever order.
    expected = 0.5 * F.cross_entropy(model(x), y)
    torch.testing.assert_close(wires.loss(batch(1), None), expected)
    assert replay.buffer_.seen == 12


def test_batch_size_and_criterion():
    model, seen = make(0.0).eval(), []

    def criterion(logits, labels):
        seen.append((logits.shape, labels.shape))
        return logits.square().mean()

    wires, _ = attach(model, gw.Replay(50, batch_size=3, criterion=criterion))
    wires.loss(batch(0, 20), None)
    wires.loss(batch(1, 20), None)
    assert seen == [((3, 6), (3,))]


def test_a_balanced_memory_is_filled_at_task_ends_only():
    model = make()
    replay = gw.Replay(12, buffer="balanced")
    wires, optimizer = attach(model, replay)
    train(model, wires, optimizer, range(3))
    assert len(replay.buffer_) == 0
    wires.consolidate([batch(0, 30, 0, 2), batch(1, 30, 0, 2)])
    assert replay.buffer_.labels.bincount().tolist() == [6, 6]
    wires.consolidate([batch(2, 30, 2, 4)])
    assert replay.buffer_.labels.bincount().tolist() == [3, 3, 3, 3]
    assert float(wires.loss(batch(3), None).detach()) > 0
    with pytest.raises(UsageError, match=r"wires\.consolidate\(loader\)"):
        wires.consolidate()


def test_strength_zero_is_plain_training_bit_for_bit():
    plain, held = make(), make()
    wires, optimizer = attach(held, gw.Replay(strength=0.0))
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for model, w, o in ((plain, None, reference), (held, wires, optimizer)):
        torch.manual_seed(1)
        train(model, w, o, range(20))
    for a, b in zip(plain.state_dict().values(), held.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_draw_leaves_the_global_random_state_alone():
    model = make(0.0)
    wires, _ = attach(model, gw.Replay(20))
    state = torch.get_rng_state()
    for step in range(3):
        wires.loss(batch(step), None)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("buffer", ["reservoir", "balanced"])
def test_saved_in_the_middle_and_resumed_the_parameters_are_bit_identical(buffer, tmp_path):
    def begin():
        model = make(0.0)
        wires, optimizer = attach(model, gw.Replay(15, buffer=buffer, seed=3))
        return model, wires, optimizer

    model, wires, optimizer = begin()
    train(model, wires, optimizer, range(5))
    wires.consolidate([batch(50, 40)])
    train(model, wires, optimizer, range(5, 9))
    tree = {
        "model": dict(model.state_dict()),
        "wires": wires.state_dict(),
        "momentum": [s["momentum_buffer"] for s in optimizer.state_dict()["state"].values()],
    }
    checkpoint.save(tmp_path / "s.safetensors", tree)
    train(model, wires, optimizer, range(9, 15))

    saved = checkpoint.load(tmp_path / "s.safetensors")
    other, again, second = begin()
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["wires"])
    state = second.state_dict()
    state["state"] = {i: {"momentum_buffer": m} for i, m in enumerate(saved["momentum"])}
    second.load_state_dict(state)
    train(other, again, second, range(9, 15))
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_memory_survives_a_new_attachment_and_validation_leaves_it_alone():
    model = make()
    replay = gw.Replay(10)
    wires, _ = attach(model, replay)
    wires.loss(batch(0), None)
    wires.detach()
    assert replay.loss(batch(1), None) is None
    wires, _ = attach(model, replay)
    with torch.no_grad():
        assert float(wires.loss(batch(2), None)) == 0.0
    assert replay.buffer_.seen == 8
    assert float(wires.loss(batch(3), None).detach()) > 0


def test_hugging_face_dicts_of_different_lengths():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 6)

        def forward(self, input_ids, attention_mask):
            mask = attention_mask.unsqueeze(-1)
            return {"logits": (self.table(input_ids) * mask).sum(1)}

    model = Bag()
    wires, _ = attach(model, gw.Replay(30))
    total = 0.0
    for length in (3, 7, 2):
        ids = torch.randint(1, 20, (5, length))
        data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 6}
        loss = wires.loss(data, model(ids, torch.ones_like(ids)))
        total += float(loss.detach())
    assert total > 0
    loss.backward()
    assert model.table.weight.grad.any()


def test_wrong_words_and_facts():
    for wrong in ({"buffer": "ring"}, {"batch_size": 0}, {"strength": -1.0}, {"capacity": 0}):
        with pytest.raises(UsageError):
            attach(make(), gw.Replay(**wrong))
    assert gw.Replay.place == "loss"
    assert gw.Replay.arxiv == "1902.10486"
    assert gw.Replay.slug == "stability-gap"
    assert repr(gw.Replay(7, seed=2)) == "Replay(capacity=7, seed=2)"


def test_it_keeps_an_old_task_that_plain_training_forgets():
    def accuracy(replay):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 4))
        wires, optimizer = attach(model, [replay] if replay else [gw.L2(0.0)])
        centres = torch.tensor([[2.0, 0], [-2, 0], [0, 2], [0, -2]])
        generator = torch.Generator().manual_seed(1)
        for task in range(2):
            for _ in range(150):
                y = torch.randint(2, (32,), generator=generator) + 2 * task
                x = centres[y] + 0.3 * torch.randn(32, 2, generator=generator)
                outputs = model(x)
                optimizer.zero_grad()
                (F.cross_entropy(outputs, y) + wires.loss((x, y), outputs)).backward()
                optimizer.step()
        y = torch.arange(200) % 2
        x = centres[y] + 0.3 * torch.randn(200, 2, generator=generator)
        return float((model(x).argmax(1) == y).float().mean())

    assert accuracy(None) < 0.2
    assert accuracy(gw.Replay(20)) > 0.9
