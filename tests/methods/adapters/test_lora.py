"""One view of LoRA layers, whatever put them there."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from guywire.core.errors import SelectionError
from guywire.methods.adapters._lora import sites


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.first(x).tanh())


def config(**more):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["first"]} | more)


@pytest.mark.parametrize(
    "how", [peft.get_peft_model, lambda m, c: peft.inject_adapter_in_model(c, m)]
)
def test_the_update_is_what_the_layer_adds(how):
    torch.manual_seed(0)
    plain = Net()
    model = how(copy.deepcopy(plain), config(init_lora_weights=False))
    (site,) = sites(model)
    assert site.name.endswith("first")
    assert site.adapter == "default"
    assert site.scaling == 3.0
    torch.testing.assert_close(site.base, plain.first.weight)
    with torch.no_grad():
        plain.first.weight += site.update()
    x = torch.randn(5, 6)
    torch.testing.assert_close(model(x), plain(x))


def test_the_factors_are_the_trained_parameters():
    model = peft.get_peft_model(Net(), config())
    (site,) = sites(model)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(site.A), id(site.B)}


def test_adapters_are_told_apart():
    model = peft.get_peft_model(Net(), config())
    model.add_adapter("second", config(r=3))
    assert [s.adapter for s in sites(model)] == ["default", "second"]
    (site,) = sites(model, ["second"])
    assert site.A.shape == (3, 6)
    with pytest.raises(SelectionError, match="no adapter 'third'"):
        sites(model, ["third"])


def test_a_model_without_lora_is_refused():
    with pytest.raises(SelectionError, match="get_peft_model"):
        sites(Net())


@pytest.mark.parametrize("layer", [nn.Embedding(7, 4), nn.Conv2d(3, 4, 3)])
def test_what_is_no_linear_layer_is_refused(layer):
    model = nn.Sequential(layer, nn.Linear(4, 2))
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model)
    with pytest.raises(SelectionError, match="only LoRA of linear layers"):
        sites(model)
