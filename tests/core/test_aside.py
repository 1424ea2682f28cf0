from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from guywire.core.aside import (
    aside,
    is_aside,
    is_listener,
    listener,
    random_state_kept,
    undisturbed,
)


class Counting(nn.Module):
    """Writes a buffer in eval mode too, and replaces another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))
        self.register_buffer("none", None)

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().mean(0)
        return x


def test_undisturbed_restores_flags_buffers_and_random_states():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), Counting(), nn.BatchNorm1d(2))
    model[3].eval()  # deliberately frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = {name: id(value) for name, value in model.named_buffers()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    for mode in (None, True, False):
        with undisturbed(model, mode=mode):
            assert is_aside()
            assert model[3].training is bool(mode)
            model(torch.randn(8, 2))
            random.random()
            np.random.rand()  # noqa: NPY002
            torch.rand(3)
    assert not is_aside()
    assert [m.training for m in model] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: id(value) for name, value in model.named_buffers()} == identities
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert bool((np.random.get_state()[1] == states[2]).all())  # noqa: NPY002


def test_undisturbed_restores_after_an_error():
    model = nn.BatchNorm1d(2)

    def fail():
        with undisturbed(model, mode=False):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert model.training
    assert not is_aside()


def test_a_graph_made_before_is_still_good_after():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    loss = model(torch.randn(4, 2)).square().mean()
    for mode in (None, False):
        with undisturbed(model, mode=mode):
            model(torch.randn(8, 2))
    loss.backward()  # the graph saved the running statistics: nobody has written to them
    assert model[1].weight.grad is not None


def test_aside_nests_and_random_state_is_kept():
    with aside():
        with aside():
            assert is_aside()
        assert is_aside()
    state = torch.get_rng_state()
    with random_state_kept():
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_listener_is_told_from_other_hooks():
    def hook():
        pass

    assert not is_listener(hook)
    assert listener(hook) is hook
    assert is_listener(hook)
