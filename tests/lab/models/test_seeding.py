from __future__ import annotations

import pytest
import torch

from guywire.lab.models.seeding import seeded


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_generator_decides_and_the_global_state_is_put_back():
    made = []
    for seed, disturb in ((0, 1), (0, 7), (1, 1)):
        torch.rand(disturb)
        before = torch.get_rng_state()
        with seeded(gen(seed)):
            made.append(torch.nn.Linear(4, 4).weight)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_the_state_is_put_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="multiplied"), seeded(gen(0)):
        torch.rand(3) @ torch.rand(2, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_generator_gives_different_models_in_turn():
    generator = gen(0)
    made = []
    for _ in range(2):
        with seeded(generator):
            made.append(torch.rand(4))
    assert not torch.equal(*made)
