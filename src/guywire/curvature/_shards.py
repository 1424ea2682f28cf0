"""Under FSDP2: hand sums to the owners of the shards block by block, in the backward pass.

A process sums the squares of its own samples' gradients over whole parameters. Where the sums of all
parameters at once would be large, those of a block that FSDP2 wraps are reduced and scattered as soon
as the backward pass enters the next block, as gradients are in training: what a process holds is its
shards, and the whole sums of a block or two. All processes enter the blocks in the same order, since
FSDP2 gathers their weights there. What comes late (a block that is used twice) is handed over in the
next pass, or at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from guywire.curvature._processes import Processes
from guywire.curvature._sums import Sums

__all__ = ["Shards"]

_WHOLE = 1 << 28
"""Bytes of whole sums that a process may hold; above, they are handed over block by block."""


class Shards:
    """The shards of sums that belong to this process.

    Args:
        sums: that passes add to.
        params: the parameters wanted, by canonical name.
        processes: with which this one works together.
    """

    def __init__(
        self, sums: Sums, params: Mapping[str, nn.Parameter], processes: Processes
    ) -> None:
        self.sums, self.params, self.processes = sums, params, processes
        self.held: dict[str, Tensor] = {}
        self._blocks: dict[nn.Module, list[str]] = {}
        self._inside: dict[nn.Module, set[nn.Module]] = {}
        self._entered: list[nn.Module] = []
        self._done: set[nn.Module] = set()
        if not (processes.sharded and sums.sharded):
            return
        shards = [name for name, p in params.items() if hasattr(p, "device_mesh")]
        if sum(params[n].numel() * sums.dtypes[n].itemsize for n in shards) > _WHOLE:
            self._find(set(shards))

    def _find(self, shards: set[str]) -> None:
        owner: dict[nn.Module, nn.Module] = {}
        for module in self.sums.model.modules():  # parents come before their children
            if hasattr(module, "set_requires_gradient_sync"):
                owner[module] = module
                self._blocks[module] = []
            for child in module.children():
                owner.setdefault(child, owner.get(module, self.sums.model))
        for (module, _), name in self.sums.names.items():
            if name in shards:
                shards.remove(name)
                self._blocks.setdefault(owner[module], []).append(name)
        self._inside = {m: set(m.modules()) for m in self._blocks}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Follow backward passes of graphs that are made meanwhile."""
        handles = [m.register_forward_hook(self._called) for m in self._blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def end_pass(self) -> None:
        """Hand over what is left when a backward pass has ended; every process calls it."""
        for block in self._blocks:
            self._hand_over(block)
        self._entered, self._done = [], set()

    def take(self, name: str) -> Tensor:
        """Return this process's shard of a sum; every process calls it, for all names in order.

        Args:
            name: of a sharded parameter.

        Returns:
            A DTensor with the parameter's placements.
        """
        self._add(name)
        return self.held.pop(name)

    def _called(self, block: nn.Module, _: Any, output: Any) -> None:
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self._enter, block))

    def _enter(self, block: nn.Module, _: Tensor) -> None:
        if block in self._entered:
            return
        for other in self._entered:
            if block not in self._inside[other]:
                self._hand_over(other)
        self._entered.append(block)

    def _hand_over(self, block: nn.Module) -> None:
        if block not in self._done:
            self._done.add(block)
            for name in self._blocks[block]:
                self._add(name)

    def _add(self, name: str) -> None:
        with torch.no_grad():
            total = self.sums.totals.pop(name, None)
            total = self.sums.zero(name) if total is None else total
            shard = self.processes.shard(total, self.params[name])
            self.held[name] = self.held[name] + shard if name in self.held else shard
