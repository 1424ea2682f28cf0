from __future__ import annotations

import pytest
import torch
from torch import nn

from guywire.core import batches
from guywire.core.errors import UsageError
from guywire.lab.models import Classifier, GrowingHead


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_growing_keeps_old_blocks_bit_identical_and_the_same_tensors():
    head = GrowingHead(7)
    head.grow(3, gen(0))
    x = torch.randn(5, 7, generator=gen(9))
    before, weight, logits = head.blocks[0].weight.clone(), head.blocks[0].weight, head(x)
    names = [name for name, _ in head.named_parameters()]
    head.grow(2, gen(1))
    assert head.blocks[0].weight is weight
    assert torch.equal(head.blocks[0].weight, before)
    assert torch.equal(head(x)[:, :3], logits)
    assert [name for name, _ in head.named_parameters()][: len(names)] == names
    assert head.classes == 5


def test_blocks_are_concatenated_linear_layers():
    head = GrowingHead(4)
    for seed, n in enumerate((1, 3, 2)):
        head.grow(n, gen(seed))
    x = torch.randn(6, 4, generator=gen(8))
    weight = torch.cat([b.weight for b in head.blocks])
    bias = torch.cat([b.bias for b in head.blocks])
    torch.testing.assert_close(head(x), x @ weight.T + bias)


def test_the_generator_decides_and_the_global_state_does_not():
    first, second, other = GrowingHead(4), GrowingHead(4), GrowingHead(4)
    state = torch.get_rng_state()
    first.grow(3, gen(0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second.grow(3, gen(0))
    other.grow(3, gen(1))
    assert torch.equal(first.blocks[0].weight, second.blocks[0].weight)
    assert not torch.equal(first.blocks[0].weight, other.blocks[0].weight)
    assert first.blocks[0].weight.abs().max() <= 0.5
    assert not first.blocks[0].bias.any()


def test_a_new_block_follows_dtype_and_mode():
    model = Classifier(nn.Linear(3, 4), 4).double().eval()
    model.grow(2, gen(0))
    model.grow(2, gen(0))
    assert model.head.blocks[1].weight.dtype == torch.float64
    assert not model.head.blocks[1].training
    assert model(torch.zeros(2, 3, dtype=torch.float64)).shape == (2, 4)


def test_labels_in_a_dict_are_passed_over():
    class Mean(nn.Module):
        def forward(self, input_ids, attention_mask):
            return (input_ids * attention_mask).float().mean(1, keepdim=True)

    model = Classifier(Mean(), 1)
    model.grow(2, gen(0))
    batch = {
        "input_ids": torch.ones(3, 5, dtype=torch.int64),
        "attention_mask": torch.ones(3, 5, dtype=torch.int64),
        "labels": torch.zeros(3, dtype=torch.int64),
    }
    assert torch.equal(model(**batch), batches.forward(model, batch))
    assert model.features(**batch).shape == (3, 1)
    assert "labels" in batch


@pytest.mark.parametrize("n", [0, -1])
def test_growing_by_nothing_is_refused(n):
    with pytest.raises(UsageError, match=str(n)):
        GrowingHead(3).grow(n, gen(0))


def test_a_head_without_classes_says_so():
    with pytest.raises(UsageError, match="grow"):
        GrowingHead(3)(torch.zeros(1, 3))
