"""Per-sample gradients of any layer, by ``torch.func`` on that layer alone.

The layer's inputs and the gradients of its outputs are those of the whole model's pass; the vector-
Jacobian product of each sample is taken by ``vmap`` in chunks, or in a loop where ``vmap`` does not
know an operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

__all__ = ["LayerCall", "batch_dims"]

# Elements of per-sample gradients formed at once.
CHUNK = 1 << 22


def batch_dims(whole: Any, one: Any, n: int) -> list[int | None] | None:
    """Say which tensors among the leaves hold a batch, from n samples and from one alone.

    Args:
        whole: tensors and other values for n samples.
        one: shapes (or ``None``) of the same leaves for one sample.
        n: the number of samples.

    Returns:
        0 for tensors that hold samples in dimension 0, ``None`` for those without a batch; or
        ``None`` altogether if there are others.
    """
    leaves = pytree.tree_leaves(whole)
    if len(leaves) != len(one):
        return None
    dims: list[int | None] = []
    for leaf, shape in zip(leaves, one, strict=True):
        if not isinstance(leaf, Tensor) or leaf.shape == shape:
            dims.append(None)
        elif shape is not None and shape[:1] == (1,) and leaf.shape == (n, *shape[1:]):
            dims.append(0)
        else:
            return None
    return dims


class LayerCall:
    """One call of a layer without a rule.

    Args:
        module: the layer.
        args: its inputs.
        kwargs: its inputs by name.
        dims: of the leaves of ``(args, kwargs)``, see :func:`batch_dims`; ``None`` if there is one
            sample, which is everything.
        n: the number of samples.
    """

    def __init__(
        self,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        dims: list[int | None] | None,
        n: int,
    ) -> None:
        leaves, self.tree = pytree.tree_flatten((args, kwargs))
        self.leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        self.module, self.dims, self.n = module, dims, n
        self.single = dims is None
        self.grads: dict[int, Tensor] = {}

    def arrived(self, index: int, g: Tensor) -> None:
        """Take the gradient of one of the outputs.

        Args:
            index: of the output among the leaves.
            g: its gradient.
        """
        self.grads[index] = g[None] if self.single else g

    def form(self, local: list[str]) -> Callable[[int, int], dict[str, Tensor]]:
        """Return the function that forms gradients for a range of samples.

        Args:
            local: names of parameters in the layer.

        Returns:
            A function of (lo, hi) to names and ``[hi - lo, *shape]``.
        """
        named = dict(self.module.named_parameters())
        params = {name: named[name].detach() for name in local}
        where = sorted(self.grads)
        grads = [self.grads[i] for i in where]
        batched = [i for i, d in enumerate(self.dims or []) if d == 0]

        def objective(params: dict[str, Tensor], xs: list[Tensor], gs: list[Tensor]) -> Tensor:
            leaves = list(self.leaves)
            for i, x in zip(batched, xs, strict=True):
                leaves[i] = x[None]
            args, kwargs = pytree.tree_unflatten(leaves, self.tree)
            out = pytree.tree_leaves(functional_call(self.module, params, args, kwargs))
            terms = [
                (out[i] * (g if self.single else g[None])).sum()
                for i, g in zip(where, gs, strict=True)
            ]
            return torch.stack(terms).sum()

        one = grad(objective)

        def together(lo: int, hi: int) -> dict[str, Tensor]:
            xs = [self.leaves[i][lo:hi] for i in batched]
            return vmap(one, in_dims=(None, 0, 0))(params, xs, [g[lo:hi] for g in grads])

        def in_turn(lo: int, hi: int) -> dict[str, Tensor]:
            rows = []
            for n in range(lo, hi):
                leaf = {k: p.clone().requires_grad_() for k, p in params.items()}
                with torch.enable_grad():
                    value = objective(
                        leaf, [self.leaves[i][n] for i in batched], [g[n] for g in grads]
                    )
                found = torch.autograd.grad(value, list(leaf.values()), allow_unused=True)
                rows.append(
                    [
                        torch.zeros_like(p) if g is None else g
                        for p, g in zip(params.values(), found, strict=True)
                    ]
                )
            return {k: torch.stack(r) for k, r in zip(params, zip(*rows, strict=True), strict=True)}

        step = max(1, CHUNK // max(1, sum(p.numel() for p in params.values())))

        def formed(lo: int, hi: int) -> dict[str, Tensor]:
            parts = []
            for at in range(lo, hi, step):
                end = min(hi, at + step)
                try:
                    parts.append(together(at, end))
                except (RuntimeError, NotImplementedError, ValueError, TypeError):
                    parts.append(in_turn(at, end))
            return {k: torch.cat([part[k] for part in parts]) for k in params}

        return formed
