from __future__ import annotations

import pytest
import torch

from guywire.core.accumulate import Accumulator
from guywire.core.errors import CheckpointError, UsageError


class Everything(Accumulator):
    def __init__(self) -> None:
        self.declare("total", torch.zeros(2), "sum")
        self.declare("peak", torch.full((), -torch.inf), "max")
        self.declare("seen", torch.zeros(0, 2), "cat")

    def update(self, x: torch.Tensor) -> None:
        self.total += x.sum(0)
        self.peak = torch.maximum(self.peak, x.max())
        self.seen = torch.cat([self.seen, x])

    def compute(self) -> tuple[torch.Tensor, ...]:
        return self.total, self.peak, self.seen


def test_batches_add_up_and_reset_forgets() -> None:
    x = torch.arange(12.0).view(6, 2)
    all_at_once, in_parts = Everything(), Everything()
    all_at_once.update(x)
    for part in x.split(4):
        in_parts.update(part)
    for a, b in zip(all_at_once.compute(), in_parts.compute(), strict=True):
        assert torch.equal(a, b)
    in_parts.reset()
    assert in_parts.total.tolist() == [0, 0]
    assert in_parts.seen.shape == (0, 2)
    in_parts.update(x)
    assert torch.equal(in_parts.total, x.sum(0))  # the zero itself was not written to


def test_state_goes_round_and_a_foreign_one_is_refused() -> None:
    first, second = Everything(), Everything()
    first.update(torch.ones(3, 2))
    state = first.state_dict()
    second.load_state_dict(state)
    assert torch.equal(second.seen, first.seen)
    first.update(torch.ones(3, 2))
    assert state["total"].tolist() == [3, 3]  # a copy
    with pytest.raises(CheckpointError, match="saved states"):
        second.load_state_dict({"total": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"'total' has shape \(3,\)"):
        second.load_state_dict({**state, "total": torch.zeros(3)})


def test_bad_declarations() -> None:
    a = Everything()
    with pytest.raises(UsageError, match="median"):
        a.declare("x", torch.zeros(1), "median")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="'total' is declared already"):
        a.declare("total", torch.zeros(1), "sum")
    with pytest.raises(UsageError, match="0-d"):
        a.declare("x", torch.zeros(()), "cat")


def test_without_processes_reduce_changes_nothing_and_the_base_is_abstract() -> None:
    a = Everything()
    a.update(torch.ones(2, 2))
    a.reduce()
    assert a.total.tolist() == [2, 2]
    with pytest.raises(NotImplementedError, match=r"update\(\)"):
        Accumulator().update()
    with pytest.raises(NotImplementedError, match=r"compute\(\)"):
        Accumulator().compute()
