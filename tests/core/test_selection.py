"""Which parameters a selection names, and what it says when there are none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from guywire.core.errors import SelectionError, UsageError
from guywire.core.selection import canonical, named_parameters, select, unwrap


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
        self.norm = nn.LayerNorm(4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight  # tied
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.head(self.embedding(x) * self.scale)


@pytest.fixture
def net():
    return Net()


def test_none_is_every_trainable_parameter_once(net):
    net.blocks[0].norm.requires_grad_(False)
    names = list(select(net))
    wanted = [n for n, p in net.named_parameters() if p.requires_grad]
    assert names == wanted
    assert "head.weight" not in names


def test_globs(net):
    assert set(select(net, "*.attention.query.*")) == {
        f"blocks.{i}.attention.query.{kind}" for i in range(2) for kind in ("weight", "bias")
    }


def test_a_tied_parameter_answers_to_any_of_its_names(net):
    assert list(select(net, "head.*")) == ["embedding.weight"]
    assert "embedding.weight" not in select(net, "!head.*")


def test_types_take_their_own_parameters_only(net):
    assert set(select(net, nn.LayerNorm)) == {
        f"blocks.{i}.norm.{kind}" for i in range(2) for kind in ("weight", "bias")
    }
    assert list(select(net, Net)) == ["scale"]
    assert list(select(net, nn.Embedding)) == ["embedding.weight"]


def test_callables_see_name_and_parameter(net):
    assert list(select(net, lambda name, p: p.dim() == 0 and name == "scale")) == ["scale"]


def test_lists_add_up_and_exclamation_marks_take_away(net):
    found = select(net, [nn.LayerNorm, "scale", "!*.bias", "!blocks.1.*"])
    assert set(found) == {"blocks.0.norm.weight", "scale"}


def test_order_is_the_models(net):
    names = list(select(net, ["scale", "blocks.1.*", "embedding.weight"]))
    assert names == [n for n in named_parameters(net) if n in set(names)]


def test_the_parameters_are_the_models_own(net):
    own = dict(net.named_parameters())
    assert all(p is own[name] for name, p in select(net).items())


@pytest.mark.parametrize("selection", ["blocks.0.atention.*", ["nothing", "nowhere"], nn.Conv2d])
def test_nothing_selected_is_an_error(net, selection):
    with pytest.raises(SelectionError, match="matches none of the 14 parameters"):
        select(net, selection)


def test_near_misses_are_named(net):
    with pytest.raises(SelectionError, match=r"near misses: .*attention\.query"):
        select(net, "*.querry.*")


def test_frozen_only_says_so(net):
    net.blocks.requires_grad_(False)
    with pytest.raises(
        SelectionError, match=r"only frozen parameters .* and 11 more.*requires_grad"
    ):
        select(net, "blocks.*")


def test_no_trainable_and_no_parameters_at_all(net):
    with pytest.raises(SelectionError, match="the model has no parameters"):
        select(nn.ReLU())
    net.requires_grad_(False)
    with pytest.raises(SelectionError, match="only frozen"):
        select(net)


@pytest.mark.parametrize("selection", [3, [None], int, ["a", 2.0]])
def test_what_is_no_selection(net, selection):
    with pytest.raises(SelectionError, match=r"is no way to select|matches none"):
        select(net, selection if not isinstance(selection, int) else [selection])


def test_an_empty_list_is_an_error(net):
    with pytest.raises(UsageError, match="empty list"):
        select(net, [])


def test_wrappers_do_not_change_names(net):
    wanted = list(named_parameters(net))
    compiled = torch.compile(net, backend="eager")
    assert list(named_parameters(compiled)) == wanted
    assert unwrap(compiled) is net
    assert unwrap(nn.DataParallel(net)) is net
    net.blocks[0] = torch.compile(net.blocks[0], backend="eager")
    assert list(named_parameters(net)) == wanted
    assert len(select(net, "blocks.0.attention.*")) == 4


@given(
    st.lists(st.sampled_from(["a", "b", "my_orig_mod", "weight"]), min_size=1), st.integers(0, 5)
)
def test_canonical_takes_away_whole_parts_only(parts, place):
    name = ".".join(parts)
    assert canonical(name) == name
    wrapped = [*parts[:place], "_orig_mod", *parts[place:]]
    assert canonical(".".join(wrapped)) == name


@given(st.data())
def test_a_glob_and_its_negation_split_the_model(data):
    net = Net()
    glob = data.draw(st.sampled_from(["*.weight", "blocks.*", "*norm*", "scale"]))
    inside, outside = select(net, glob).keys(), select(net, "!" + glob).keys()
    assert not inside & outside
    assert inside | outside == select(net).keys()
