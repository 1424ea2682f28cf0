"""Layers without a rule, listened to as wholes: their inputs, and the gradients of their outputs.

What one call of them gives is made of these by `torch.func`, see `_fallback`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from guywire.core import batches
from guywire.curvature._fallback import LayerCall, batch_dims
from guywire.curvature._pieces import Direct, Lazy, Piece
from guywire.curvature._routes import Probe
from guywire.curvature._sums import Sums

__all__ = ["Root", "WholeLayers"]


class Root(torch.autograd.Function):
    """Return a tensor as the start of a graph; in-place operations on it are allowed."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, holder: list[Tensor]) -> Tensor:
        return holder.pop()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class WholeLayers(Sums):
    """The part of a recorder that hears layers without a rule, and the state of one forward pass.

    Args:
        model: the unwrapped model, already quiet.
        names: (module, local name) to canonical name, for the parameters wanted.
        dtypes: canonical name to the type of its sum.
        shapes: canonical name to shape.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[tuple[nn.Module, str], str],
        dtypes: Mapping[str, torch.dtype],
        shapes: Mapping[str, torch.Size],
    ) -> None:
        super().__init__(model, names, dtypes, shapes)
        self.probing: Probe | None = None
        self.probe: Probe | None = None
        self._active = False

    def _begin(self, n: int) -> None:
        """Forget the last forward pass; the next one is of n samples."""
        self._n = n
        self._layer_count: Counter[nn.Module] = Counter()
        self._layer_calls: list[tuple[LayerCall, dict[str, str]]] = []
        self._pending: dict[str, list[Piece]] = {}
        self.uses = {}
        self.newly_unsplit: set[nn.Module] = set()
        self.stale = False
        device = batches.device_of(self.model)
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    def _rooted(self, x: Tensor) -> Tensor:
        return cast(Tensor, Root.apply(self._anchor, [x]))

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._active and self.probing is not None:
            at = (module, sum(key[0] is module for key in self.probing.shapes))
            self.probing.called.add(module)
            self.probing.shapes[at] = (_shapes((args, kwargs)), _shapes(output))

    def _layer_called(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._active:
            return None
        wanted = {k: n for k, n in self.fallbacks[module].items() if n not in self.hidden}
        key = (module, self._layer_count[module])
        self._layer_count[module] += 1
        for name in wanted.values():
            self.uses.setdefault(name, []).append(None)
        leaves, tree = pytree.tree_flatten(output)
        where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
        dims = None
        if self._n > 1:
            seen = None if self.probe is None else self.probe.shapes.get(key)
            if seen is None:
                self.stale = True
                return None
            dims = batch_dims((args, kwargs), seen[0], self._n)
            outs = batch_dims(output, seen[1], self._n)
            if dims is None or outs is None or any(outs[i] is None for i in where):
                self.newly_unsplit.add(module)
                return None
        call = LayerCall(module, args, kwargs, dims, self._n)
        self._layer_calls.append((call, wanted))
        inputs = {x.data_ptr() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for i in where:
            x = leaves[i]
            if not x.requires_grad:
                x = x.clone() if x.data_ptr() in inputs else x
                x = self._rooted(x)
            x.register_hook(partial(call.arrived, i))
            leaves[i] = x
        return pytree.tree_unflatten(leaves, tree)

    def _finish_layer(self, call: LayerCall, wanted: dict[str, str]) -> None:
        if not call.grads:
            return
        form = call.form(list(wanted))
        size = sum(self.shapes[name].numel() for name in wanted.values())
        if all(len(self.uses[name]) == 1 for name in wanted.values()):
            step = max(1, (1 << 22) // max(1, size))
            for lo in range(0, call.n, step):
                for local, g in form(lo, min(call.n, lo + step)).items():
                    name = wanted[local]
                    self.add(name, Direct(g, self.dtypes[name]), None)
        else:
            for local, name in wanted.items():

                def rows(lo: int, hi: int, local: str = local) -> Tensor:
                    return form(lo, hi)[local]

                piece = Lazy(rows, call.n, self.shapes[name], size)
                self._pending.setdefault(name, []).append(piece)
        call.grads.clear()


def _shapes(tree: Any) -> list[Any]:
    return [x.shape if isinstance(x, Tensor) else None for x in pytree.tree_leaves(tree)]
