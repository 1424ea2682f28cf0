from __future__ import annotations

import pytest
import torch
from torch import nn

import guywire as gw
from guywire.core.regularizer import strength_at
from guywire.lab.studies.fisher_sequential_transfer import holds


class Outputs(dict):
    @property
    def loss(self):
        return self["loss"]


class Regression(nn.Module):
    """Batches of ``x, labels``; the loss is a mean over the batch, as in the transformers."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0]))
        self.unused = nn.Parameter(torch.ones(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, labels):
        return Outputs(loss=0.5 * (self.dropout(x) @ self.w - labels).square().mean())


def batches(n, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    y = torch.randn(n, generator=generator)
    return x, y, [{"x": x[i : i + size], "labels": y[i : i + size]} for i in range(0, n, size)]


def test_the_schedule_of_the_code():
    found = [holds.falling(e, 20) for e in (0, 5, 10, 15, 16, 20)]
    assert found == pytest.approx([0.9, 0.675, 0.45, 0.225, 0.2, 0.2])
    every = [holds.falling(e, 20) for e in range(21)]
    assert every == sorted(every, reverse=True)


def test_the_strength_used_in_the_step_changes_with_the_epoch():
    learnt = {"model": {}, "ewc": {"mean": {}, "precision": {}, "tasks": 1}}
    (ewc,), state = holds.hold("decreasing", 2.0, learnt, epochs=20, per_epoch=7)
    assert state is learnt["ewc"]
    used = [strength_at(ewc.strength, step) for step in range(140)]
    # with the paper's 1/2, and scaled by 2: lambda itself
    assert used == pytest.approx([holds.falling(step // 7, 20) for step in range(140)])
    (constant,), _ = holds.hold("constant", 2.0, learnt, epochs=20, per_epoch=7)
    assert strength_at(constant.strength, 139) == pytest.approx(0.9)


def test_arms_that_hold_nothing():
    for arm in ("scratch", "plain", "unfreezing"):
        assert holds.hold(arm, 1.0, {}, 5, 5) == ([], None)


def test_squared_batch_gradients_are_too_small_and_depend_on_the_batch():
    model = Regression()
    x, y, _ = batches(512, 1)
    per_sample = (x @ model.w - y)[:, None] * x
    fisher = per_sample.detach().square().mean(0)
    found = {
        size: holds.squared_batch_gradients(model, batches(512, size)[2])["w"]
        for size in (1, 8, 32)
    }
    assert torch.allclose(found[1], fisher, rtol=1e-5)
    m = per_sample.detach().mean(0)
    v = per_sample.detach().var(0, unbiased=False)
    for size in (8, 32):  # in expectation m^2 + v / B
        assert torch.allclose(found[size], m.square() + v / size, rtol=0.6)
        assert (found[size] < 0.35 * fisher).all()
    assert (found[32] < found[8]).all()


def test_they_are_taken_in_eval_mode_and_leave_the_model_as_it_was():
    model = Regression()
    once, again = (holds.squared_batch_gradients(model, batches(16, 4)[2]) for _ in range(2))
    assert torch.equal(once["w"], again["w"])  # dropout was off
    assert torch.equal(once["unused"], torch.zeros(3))
    assert model.training
    assert model.w.grad is None


def test_the_pull_ratio_is_what_the_hook_added():
    model = Regression().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    anchor = {"w": torch.zeros(2), "unused": torch.zeros(3)}
    _, _, (batch,) = batches(8, 8)
    with gw.attach(model, optimizer, gw.L2(strength=0.25, anchor=anchor)):
        model(**batch).loss.backward()
        task = holds.gradients(model)
        optimizer.step()
        found = holds.pull_ratio(task, holds.gradients(model))
    pull = 0.5 * torch.cat([model.w, model.unused]).detach()
    assert found == pytest.approx(float(pull.norm() / task["w"].norm()), rel=1e-5)


class Pieces(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.shared = nn.Embedding(3, 2)
        self.encoder = nn.ModuleDict({"embed": self.shared})
        for i in range(n):
            self.encoder[f"layer{i}"] = nn.Linear(2, 2, bias=False)
        self.decoder = nn.Linear(2, 2)

    def get_encoder(self):
        return self.encoder

    def get_input_embeddings(self):
        return self.shared


def test_thawing_goes_from_a_tenth_to_all_from_the_input_up():
    model = Pieces(20)
    free = []
    for epoch in range(10):
        holds.thaw(model, epoch, 10)
        flags = [model.encoder[f"layer{i}"].weight.requires_grad for i in range(20)]
        assert flags == sorted(flags, reverse=True)
        assert model.shared.weight.requires_grad
        assert all(p.requires_grad for p in model.decoder.parameters())
        free.append(sum(flags))
    assert free[0] == 2
    assert free == sorted(free)
    assert free[7:] == [20, 20, 20]  # all of them after 80 % of the epochs
