"""Build modules whose constructors draw from the global random state, without touching it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Within the context, layers made on the CPU take their first values from a generator.

    PyTorch's and Hugging Face's constructors know no generator. The CPU's global state is seeded
    by one draw from the generator and put back afterwards; other devices' states are not touched,
    as layers are made on the CPU whatever the default device is.

    Args:
        generator: gives one number.

    Yields:
        Nothing.

    Example:
        >>> before = torch.get_rng_state()
        >>> with seeded(torch.Generator().manual_seed(0)):
        ...     layer = torch.nn.Linear(2, 2)
        >>> bool((torch.get_rng_state() == before).all())
        True
    """
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        with torch.device("cpu"):
            yield
    finally:
        torch.set_rng_state(state)
