from __future__ import annotations

import torch

from guywire.lab.training.seeding import generator, seed_of


def test_a_seed_depends_on_every_part_and_their_order() -> None:
    seeds = {
        seed_of(0, "a", "b"),
        seed_of(0, "b", "a"),
        seed_of(1, "a", "b"),
        seed_of(0, "ab"),
        seed_of(0, "a", "b", 0),
        seed_of("0", "a", "b"),
    }
    assert len(seeds) == 6
    assert all(0 <= s < 1 << 63 for s in seeds)


def test_seeds_are_the_same_for_ever() -> None:
    # Results on disk rest on this number: a change would make old runs impossible to resume.
    assert seed_of(0, "ewc-seed0", "init") == 7004186701635445225


def test_generators_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    a = torch.randn(3, generator=generator(1, "x"))
    assert torch.equal(a, torch.randn(3, generator=generator(1, "x")))
    assert torch.equal(before, torch.get_rng_state())
