from __future__ import annotations

import pytest
import torch
from torch import nn

from guywire.core import exchange
from guywire.core.errors import AttachError
from guywire.core.exchange import exchanged, through, values_of


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("passing", torch.ones(1), persistent=False)
        self.register_buffer("mean", self.norm.running_mean)  # the same tensor twice

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


def copies(model):
    return {name: value.detach().clone() for name, value in values_of(model).items()}


def test_values_are_the_tensors_themselves_once_and_not_the_passing_ones():
    model = Tied()
    values = values_of(model)
    assert values["embed.weight"] is model.embed.weight
    assert "head.weight" not in values
    assert "passing" not in values
    assert ("mean" in values) != ("norm.running_mean" in values)
    assert len({id(v) for v in values.values()}) == len(values)


def test_within_the_model_answers_as_the_other_did_and_then_both_are_back_bit_for_bit():
    torch.manual_seed(1)
    model, other = Tied().eval(), Tied().eval()
    nn.init.normal_(other.norm.running_mean)
    nn.init.normal_(other.embed.weight)
    x = torch.arange(5)
    wanted, own = other(x), model(x)
    values, before = copies(other), copies(model)
    with exchanged(model, values):
        assert torch.equal(model(x), wanted)
        assert torch.equal(values["embed.weight"], before["embed.weight"])  # no third copy is held
    assert torch.equal(model(x), own)
    for name, value in copies(other).items():
        assert torch.equal(values[name], value)


def test_a_graph_made_before_gives_the_gradient_of_before():
    model = Tied()
    x = torch.arange(5)
    loss = model(x).square().sum()
    (wanted,) = torch.autograd.grad(loss, [model.embed.weight], retain_graph=True)
    with exchanged(model, {n: torch.randn_like(v) if v.is_floating_point() else v.clone()
                           for n, v in copies(model).items()}), torch.no_grad():  # fmt: skip
        model(x)
    loss.backward()
    assert torch.equal(model.embed.weight.grad, wanted)


def test_an_error_within_puts_both_back():
    model = nn.Linear(2, 2)
    before = copies(model)
    values = {"weight": torch.zeros(2, 2)}
    with pytest.raises(RuntimeError, match="inside"), exchanged(model, values):
        raise RuntimeError("inside")
    assert torch.equal(model.weight, before["weight"])
    assert not values["weight"].any()


def test_want_of_memory_half_way_puts_back_what_was_traded(monkeypatch):
    model = nn.Linear(2, 2)
    before = copies(model)
    values = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    trade = exchange._trade

    def scarce(mine, theirs):
        if mine.dim() == 1 and not theirs.any():
            raise MemoryError
        trade(mine, theirs)

    monkeypatch.setattr(exchange, "_trade", scarce)
    with pytest.raises(MemoryError), exchanged(model, values):
        pytest.fail("entered")
    for name, value in copies(model).items():
        assert torch.equal(value, before[name])
    assert not any(value.any() for value in values.values())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"weights": torch.zeros(2, 2)}, "no 'weights'"),
        ({"weight": torch.zeros(3, 2)}, r"'weight' is \(2, 2\) of torch.float32"),
        ({"weight": torch.zeros(2, 2).double()}, "of torch.float64 elsewhere"),
    ],
)
def test_values_that_do_not_fit_are_refused_before_anything_moves(values, words):
    model = nn.Linear(2, 2)
    before = copies(model)
    with (
        pytest.raises(AttachError, match=words),
        exchanged(model, {"bias": torch.zeros(2), **values}),
    ):
        pytest.fail("entered")
    assert torch.equal(model.bias, before["bias"])


def test_through_changes_no_number_and_lets_a_zero_gradient_reach_the_outputs():
    inside = torch.randn(3, requires_grad=True)
    logits = (inside * 2.0).log()  # some are NaN
    outputs = {"hidden": torch.zeros(2), "logits": logits}
    reached = []
    logits.register_hook(reached.append)
    value = inside.square()
    tied = through(value, outputs)
    assert torch.equal(tied, value)
    (gradient,) = torch.autograd.grad(tied.sum(), [value], retain_graph=True)
    assert torch.equal(gradient, torch.ones(3))
    tied.sum().backward()
    assert [g.tolist() for g in reached] == [[0.0, 0.0, 0.0]]


def test_through_outputs_without_a_graph_is_nothing():
    value = torch.ones(2, requires_grad=True) * 2.0
    assert through(value, (torch.zeros(2), "words")) is value
