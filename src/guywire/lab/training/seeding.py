"""Seeds: every random draw of a trial comes from a generator named by what it is for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["deterministic", "generator", "seed_of"]


def seed_of(*parts: str | int) -> int:
    """Hash names and numbers to a seed of 63 bits.

    Args:
        parts: who asks and what for, e.g. ``(run_seed, "ewc-seed0", "shuffle", task, epoch)``.

    Returns:
        A number that depends on every part and on their order, the same on every machine.

    Example:
        >>> seed_of(0, "init") == seed_of(0, "init"), seed_of(0, "init") == seed_of(1, "init")
        (True, False)
    """
    digest = hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: str | int) -> torch.Generator:
    """Return a CPU generator seeded by :func:`seed_of`.

    Args:
        parts: as there.

    Returns:
        A new generator.
    """
    return torch.Generator().manual_seed(seed_of(*parts))


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Make torch's results repeatable within the context.

    Args:
        threads: of torch; sums over several threads differ in the last digits.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if before[0] != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        torch.use_deterministic_algorithms(before[1], warn_only=warn_only)
        if before[0] != threads:
            torch.set_num_threads(before[0])
