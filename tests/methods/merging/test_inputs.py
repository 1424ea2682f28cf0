"""What linear layers get as inputs: sums by hand, padding, transposed weights, no traces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from guywire.core.errors import UsageError
from guywire.methods.merging import layer_inputs


def test_means_and_squares_over_all_batches():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    data = [(torch.randn(5, 3, generator=torch.Generator().manual_seed(i)), None) for i in range(3)]
    seen = layer_inputs(model, data)
    x = torch.cat([batch[0] for batch in data])
    hidden = model[:2](x).detach()
    for name, wanted in (("0", x), ("2", hidden)):
        torch.testing.assert_close(seen[name].mean, wanted.mean(0))
        torch.testing.assert_close(seen[name].square, wanted.square().mean(0))
        torch.testing.assert_close(seen[name].norms, wanted.norm(dim=0))
        torch.testing.assert_close(seen[name].rows, wanted)
        assert seen[name].count == 15
        assert not seen[name].transposed


def test_only_so_many_rows_are_kept_from_several_batches():
    model = nn.Linear(2, 1)
    data = [(torch.full((400, 2), float(i)), None) for i in range(10)]
    seen = layer_inputs(model, data, rows=64)[""]
    assert seen.count == 4000
    assert len(seen.rows) == 64
    assert len(seen.rows[:, 0].unique()) >= 6
    torch.testing.assert_close(seen.mean, torch.full((2,), 4.5))


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.first = nn.Linear(4, 4)
        self.pooled = nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask):
        hidden = self.first(self.embed(input_ids))
        return self.pooled(hidden[:, 0])


def test_padding_does_not_count():
    model = Texts()
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    seen = layer_inputs(model, [{"input_ids": ids, "attention_mask": mask, "labels": ids}])
    tokens = model.embed(torch.tensor([1, 2, 3, 4, 5])).detach()
    assert seen["first"].count == 5
    torch.testing.assert_close(seen["first"].mean, tokens.mean(0))
    assert seen["pooled"].count == 2  # one vector a text: not the mask's shape


def test_gpt2_keeps_its_weights_the_other_way_round():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    with torch.random.fork_rng([]):
        model = transformers.GPT2LMHeadModel(config)
    seen = layer_inputs(model, [{"input_ids": torch.arange(6).view(2, 3)}])
    layer = seen["transformer.h.0.mlp.c_fc"]
    assert layer.transposed
    assert layer.mean.shape == (8,)
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (8, 32)
    assert not seen["lm_head"].transposed


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model.train()
    before = {n: b.clone() for n, b in model.state_dict().items()}
    state = torch.get_rng_state()
    layer_inputs(model, [(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), None)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, before[n]) for n, b in model.state_dict().items())
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_no_data_and_no_layer_are_refused():
    with pytest.raises(UsageError, match="none of the model's 1 linear layers got an input"):
        layer_inputs(nn.Linear(2, 1), [])
    with pytest.raises(UsageError, match="none of the model's 0 linear layers"):
        layer_inputs(nn.Conv2d(1, 1, 1), [(torch.zeros(1, 1, 2, 2), None)])
