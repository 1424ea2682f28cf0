"""The Fisher information of a layer's outputs: the mean of ``G G'`` over *per-sample* gradients.

    F = 1/N sum_n G_n G_n',     G_n = d/dW -log p(y_n | x_n)   of shape [out, in]

for the weight W of a linear layer. Its large eigenvectors are the directions among a layer's outputs
that the data depend on: what a change D of W costs there is about ``tr(D' F D)``. One matrix of
``[out, out]`` a layer, where the whole Fisher information of W would be ``[out in, out in]``.

The gradient of a mean over samples will not do: the products of different samples do not cancel.
So this listens to the layers as :func:`guywire.curvature.diagonal_fisher` does, one forward and one
backward pass a batch. A sample's gradient is L R' with L ``[out, T]`` and R ``[in, T]`` over its T
positions, and ``G G' = L (R' R) L'`` without G where positions are fewer than inputs.

Source: the Fisher information that AlignGuard-LoRA, arXiv 2508.02079, multiplies updates with from the
left; this reading (``E[G G']``) is ours, the only one whose shapes fit. It is the left factor of
Shampoo, Gupta et al., arXiv 1802.09568, from per-sample gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from guywire.core import batches as batching
from guywire.core.errors import SelectionError
from guywire.core.selection import Selection
from guywire.core.selection import select as select_parameters
from guywire.core.tensors import Tensors
from guywire.curvature._capture import Recorder
from guywire.curvature._estimate import estimate
from guywire.curvature._pieces import BUFFER, Outer, Piece, Rows, joined

__all__ = ["output_gram"]


def output_gram(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    labels: Literal["expected", "sampled", "true"] = "true",
    unit: Literal["sample", "token"] = "sample",
    select: Selection = None,
    generator: torch.Generator | None = None,
) -> Tensors:
    """Return ``E[G G']`` for the weights of linear layers, frozen ones included.

    Targets, padding, units, modes, distributed models and what is left as it was are as in
    :func:`guywire.curvature.diagonal_fisher`; under FSDP2 too all processes get whole matrices.

    Args:
        model: gives logits; plain, compiled, wrapped by DDP or FSDP2, or with PEFT's adapters.
        batches: pairs ``(inputs, labels)`` or Hugging Face dicts.
        labels: the ``"true"`` ones (the empirical Fisher information), ``"sampled"`` from the
            model's own distribution, or ``"expected"`` over it.
        unit: whose gradient G is: a whole ``"sample"``'s, or a ``"token"``'s.
        select: which weights, see :func:`guywire.select`; those of all linear layers if ``None``.
            Each takes ``[out, out]`` numbers: leave a large vocabulary's head out.
        generator: for ``"sampled"``; a new one with seed 0 if ``None``.

    Returns:
        Canonical names to symmetric matrices ``[out, out]``, float32 (float64 for float64 weights).

    Raises:
        SelectionError: the selection matches no weight of a linear layer.
        UsageError: as for the diagonal.
        DataError: as for the diagonal.

    Example:
        Two classes at even odds: ``G = (p - y) x'``, so ``F = |x|^2 (p - y)(p - y)'``.

        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([0])
        >>> output_gram(model, [(x, y)])
        {'weight': tensor([[ 1.2500, -1.2500],
                [-1.2500,  1.2500]])}
    """
    found = estimate(
        model,
        batches,
        lambda inner: _weights(inner, select),
        labels=labels,
        unit=unit,
        generator=generator,
        recorder=_Grams,
    )
    return {name: (total + total.T) / 2 for name, total in found.items()}


def _weights(model: nn.Module, selection: Selection) -> dict[str, nn.Parameter]:
    weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) or _is_conv1d(m)}
    weights |= {
        id(p)
        for m in model.modules()
        if isinstance(m, nn.MultiheadAttention)
        for p in m.parameters(recurse=False)
        if p.dim() == 2
    }
    chosen = select_parameters(model, selection, frozen=True)
    found = {name: p for name, p in chosen.items() if id(p) in weights}
    if not found:
        raise SelectionError(
            f"the selection {selection!r} names no weight of a linear layer: "
            f"of {len(chosen)} parameters that match, the first is {next(iter(chosen))!r}"
        )
    return found


def _is_conv1d(module: Any) -> bool:
    # GPT-2's layer, a linear one whose weight is [in, out].
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


class _Grams(Recorder):
    """Sums of G G' instead of squares."""

    sharded = False

    def _turned(self, name: str) -> bool:
        return any(n == name and _is_conv1d(module) for (module, _), n in self.names.items())

    def _width(self, name: str) -> int:
        return self.shapes[name][1 if self._turned(name) else 0]

    def zero(self, name: str) -> Tensor:
        """Return zeros ``[out, out]``."""
        out = self._width(name)
        device = batching.device_of(self.model)
        return torch.zeros(out, out, dtype=self.dtypes[name], device=device)

    def separable(self, uses: list[Rows]) -> bool:
        """Say whether there is one use, of all rows: rows of their own meet off the diagonal."""
        return len(uses) == 1 and uses[0] is None

    def add(self, name: str, piece: Piece, rows: Rows) -> None:
        """Add the products of one use's gradients."""
        self.add_sum(name, [piece])

    def add_sum(self, name: str, pieces: list[Piece]) -> None:
        """Add the products of the summed gradients of several uses."""
        total, turned = self._total(name), self._turned(name)
        outers = [p for p in pieces if isinstance(p, Outer) and p.groups == 1]
        if len(outers) == len(pieces):
            _add_outer(joined(outers), total, turned)
        else:
            _add_rows(pieces, total, turned)


def _add_outer(piece: Outer, total: Tensor, turned: bool) -> None:
    t = piece.t
    inputs = piece.m if turned else piece.k
    if t == 0 or piece.count == 0:
        return
    by_positions = t <= inputs
    size = t * (piece.m + piece.k + t) + (0 if by_positions else piece.m * piece.k)
    step = max(1, BUFFER // size)
    for lo in range(0, piece.count, step):
        hi = min(piece.count, lo + step)
        left, right = piece._left(lo, hi)[:, 0], piece._right(lo, hi)[:, 0]
        if turned:
            left, right = right, left
        if by_positions:
            inner = right.transpose(1, 2) @ right
            total.addmm_(_wide(left @ inner), _wide(left).T)
        else:
            gradient = _wide(left @ right.transpose(1, 2))
            total.addmm_(gradient, gradient.T)


def _add_rows(pieces: Sequence[Piece], total: Tensor, turned: bool) -> None:
    shape = pieces[0].shape
    step = max(1, BUFFER // max(1, shape.numel()))
    for lo in range(0, pieces[0].count, step):
        hi = min(pieces[0].count, lo + step)
        gradient = pieces[0].rows(lo, hi)
        for piece in pieces[1:]:
            gradient = gradient + piece.rows(lo, hi)
        gradient = gradient.to(total.dtype)
        flat = _wide(gradient.transpose(1, 2) if turned else gradient)
        total.addmm_(flat, flat.T)


def _wide(x: Tensor) -> Tensor:
    """Return ``[n, rows, columns]`` as ``[rows, n columns]``."""
    return x.transpose(0, 1).flatten(1)
