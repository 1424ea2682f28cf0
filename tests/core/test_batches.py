"""Taking batches apart."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from guywire.core import batches
from guywire.core.errors import DataError

X, Y = torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0])


class Keywords(nn.Module):
    def forward(self, **inputs):
        return {"logits": inputs["x"], "seen": sorted(inputs)}


def test_labels():
    assert batches.labels_of((X, Y)) is Y
    assert batches.labels_of([X, Y]) is Y
    assert batches.labels_of({"x": X, "labels": Y}) is Y


@pytest.mark.parametrize("bad", [X, (X,), (X, Y, Y), "ab", 3])
def test_what_is_no_batch(bad):
    with pytest.raises(DataError, match="pair"):
        batches.labels_of(bad)
    with pytest.raises(DataError, match="pair"):
        batches.forward(nn.Identity(), bad)


def test_a_dict_without_labels_names_its_keys():
    with pytest.raises(DataError, match=r"\['a', 'b'\] has no 'labels'"):
        batches.labels_of({"a": X, "b": Y})


def test_forward_passes_inputs_only():
    assert batches.forward(nn.Identity(), (X, Y)) is X
    assert batches.forward(nn.Bilinear(2, 2, 1), ((X, X), Y)).shape == (3, 1)
    assert batches.forward(Keywords(), {"x": X, "labels": Y})["seen"] == ["x"]


def test_encoder_decoders_get_the_labels():
    model = Keywords()
    model.config = SimpleNamespace(is_encoder_decoder=True)
    assert batches.forward(model, {"x": X, "labels": Y})["seen"] == ["labels", "x"]


def test_logits():
    for outputs in (X, {"logits": X}, SimpleNamespace(logits=X), (X, Y), [X]):
        assert batches.logits_of(outputs) is X
    with pytest.raises(DataError, match="no logits in the model's output, a dict"):
        batches.logits_of({"loss": X})


def test_sizes():
    assert batches.size_of((X, Y)) == 3
    assert batches.size_of(((X, X), Y)) == 3
    assert batches.size_of({"ids": X, "labels": Y}) == 3
    with pytest.raises(DataError, match="no tensor"):
        batches.size_of({"a": 1})


def test_moving_keeps_the_structure():
    Pair = namedtuple("Pair", "x y")
    meta = torch.device("meta")
    batch = {"a": [X, (X, Y)], "pair": Pair(X, "text"), "n": 3}
    moved = batches.to(batch, meta)
    assert moved["a"][0].device == meta
    assert moved["a"][1][1].device == meta
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].y == "text"
    assert moved["n"] == 3
    assert batches.to(X, X.device) is X


def test_device():
    assert batches.device_of(nn.Linear(1, 1, device="meta")).type == "meta"
    assert batches.device_of(nn.ReLU()).type == "cpu"
