"""The methods of ``guywire merge``, each on one piece of one tensor: pure functions, no files.

An edit has two steps, and a method is a choice for each. First every fine-tuned model's change
``d_i = tuned_i - base`` is pruned to some positions:

- not at all (linear);
- at random, by seed and name, and divided by q (dare: ``q = 1 - rate``; darex-q: a larger q);
- by importance, without rescaling (magnitude and ties: the largest of the tensor; wanda: the largest
  of each row after weighting with the inputs' norms).

Then what is left is put together, with a weight w_i for each model:

- added (linear, dare, darex-q, magnitude, wanda): ``base + scale * sum_i w_i d_i``;
- or elected (ties, dare-ties): a position's sign is that of ``sum_i w_i d_i``, only models that agree
  count, and their mean is added: ``base + scale * sum_agree w_i d_i / sum_agree w_i``.

Sources: task arithmetic arXiv 2212.04089; DARE arXiv 2311.03099; DAREx-q arXiv 2410.09344; TIES arXiv
2306.01708 (equations of section 3); WANDA arXiv 2306.11695.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guywire.methods.merging.masks import survivors

__all__ = ["METHODS", "Change", "Method", "add", "draw", "elect", "mask_name", "touched"]


@dataclass(frozen=True)
class Method:
    """What a method does in the two steps.

    Attributes:
        prune: ``"none"``, ``"random"``, ``"magnitude"`` or ``"wanda"``.
        elects: elect a sign instead of adding.
        rescales: divide what survives by q; ``"dare"`` is ``1 - rate``, ``"darex"`` a chosen q.
        says: in a few words, for people.
    """

    prune: str
    elects: bool
    rescales: str | None
    says: str

    @property
    def default_rate(self) -> float | None:
        """The rate where none is given; ``None`` for methods that do not prune."""
        return {"none": None, "random": 0.9}.get(self.prune, 0.8)


METHODS = {
    "linear": Method("none", False, None, "add the changes as they are"),
    "dare": Method("random", False, "dare", "drop at random, rescale by 1 / (1 - rate), add"),
    "darex-q": Method("random", False, "darex", "drop at random, rescale by 1 / q, add"),
    "dare-ties": Method("random", True, "dare", "as dare, but models elect each weight's sign"),
    "ties": Method("magnitude", True, None, "keep the largest, models elect each weight's sign"),
    "magnitude": Method("magnitude", False, None, "keep the largest changes of each tensor, add"),
    "wanda": Method("wanda", False, None, "keep the largest by change times input, add"),
}
"""Names to methods."""


@dataclass(frozen=True)
class Change:
    """One fine-tuned model's piece of a tensor, beside the base's.

    Attributes:
        base: pretrained values in their own type, ``[n]``.
        tuned: fine-tuned values in their own type, ``[n]``; or ``None``.
        delta: the change itself, ``[n]``, where that is what is known (adapters).
        widened: the base in ``wide``, where that was computed already (for another model, say).
    """

    base: Tensor
    tuned: Tensor | None
    delta: Tensor | None = None
    widened: Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        """The type in which changes are computed, at least float32."""
        other = self.base.dtype if self.tuned is None else self.tuned.dtype
        return torch.promote_types(torch.promote_types(self.base.dtype, other), torch.float32)

    def at(self, kept: Tensor | None = None) -> Tensor:
        """Return the change.

        Args:
            kept: positions, int64; all of them if ``None``.

        Returns:
            ``[len(kept)]``, at least float32.
        """
        if self.tuned is None:
            assert self.delta is not None
            return _pick(self.delta, kept).to(self.wide, copy=True)
        wide, after = self.wide, _pick(self.tuned, kept)
        if kept is None and self.widened is not None and self.widened.dtype == wide:
            before = self.widened
        else:
            before = _pick(self.base, kept).to(wide)
        return after - before if after.dtype == wide else after.to(wide).sub_(before)

    def final(self, kept: Tensor | None = None) -> Tensor:
        """Return the fine-tuned values, bit for bit where they are known.

        Args:
            kept: positions, int64; all of them if ``None``.

        Returns:
            ``[len(kept)]``.
        """
        if self.tuned is None:
            return _pick(self.base, kept).to(self.wide) + self.at(kept)
        return _pick(self.tuned, kept)


def mask_name(name: str, model: int) -> str:
    """Return the name under which a model's survivors are drawn.

    Args:
        name: of the tensor.
        model: its number in the merge, from 0.

    Returns:
        The tensor's name itself for the first model, so that a merge of one model has the survivors
        of :func:`~guywire.methods.merging.drop_and_rescale`.
    """
    return f"{name}#{model}" if model else name


def draw(
    name: str, model: int, rate: float, seed: int, numel: int, start: int, stop: int
) -> Tensor:
    """Draw the survivors of one model in a piece of a tensor.

    Args:
        name: of the tensor.
        model: its number in the merge, from 0.
        rate: probability that a weight is dropped.
        seed: of the draw.
        numel: weights of the tensor.
        start: first weight of the piece.
        stop: after its last one.

    Returns:
        Positions in the *piece*, int64, increasing.
    """
    found = survivors(mask_name(name, model), numel, rate, seed, start=start, stop=stop)
    return found.sub_(start) if start else found


def touched(kept: Sequence[Tensor | None], length: int) -> Tensor | None:
    """Return the positions that any model touches.

    Args:
        kept: of each model; ``None`` for all positions.
        length: of the piece.

    Returns:
        Positions, int64, increasing; ``None`` for all.
    """
    if any(k is None for k in kept):
        return None
    if len(kept) == 1:
        return kept[0]
    mask = torch.zeros(length, dtype=torch.bool)
    for k in kept:
        if k is not None:
            mask.index_fill_(0, k, True)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # five times as fast as nonzero()


def add(
    base: Tensor,
    changes: Sequence[Change],
    kept: Sequence[Tensor | None],
    factors: Sequence[float],
    out: Tensor,
) -> None:
    """Write ``base + sum_i factor_i * change_i`` over ``out``, at the positions that survive.

    A single change with the factor 1 gives the fine-tuned values themselves, bit for bit.

    Args:
        base: pretrained values in their own type, ``[n]``.
        changes: of each model.
        kept: of each model, positions int64; ``None`` for all.
        factors: of each model: its weight, times the scale, over q.
        out: a copy of the base in the type of the result, ``[n]``; edited in place.

    Example:
        >>> base, tuned = torch.zeros(3), torch.ones(3)
        >>> out = base.clone()
        >>> add(base, [Change(base, tuned)], [torch.tensor([0, 2])], [2.0], out)
        >>> out
        tensor([2., 0., 2.])
    """
    if len(changes) == 1:
        change, where = changes[0], kept[0]
        if factors[0] == 1.0:
            _put(out, where, change.final(where))
        else:
            value = change.at(where).mul_(factors[0])
            _put(out, where, value.add_(_pick(base, where)))
        return
    wide = _wide(changes)
    total = torch.zeros(len(base), dtype=wide)
    for change, where, factor in zip(changes, kept, factors, strict=True):
        value = change.at(where).to(wide).mul_(factor)
        _add_at(total, where, value)
    # Positions of two models are written twice, with one value: cheaper than their union.
    for where in [None] if any(k is None for k in kept) else kept:
        _put(out, where, _pick(total, where) + _pick(base, where))


def elect(
    base: Tensor,
    changes: Sequence[Change],
    kept: Sequence[Tensor | None],
    factors: Sequence[float],
    weights: Sequence[float],
    scale: float,
    out: Tensor,
) -> None:
    """Let models elect each position's sign and write the mean of those that agree over ``out``.

    A tie of the sums elects plus, as the paper's code does.

    Args:
        base: pretrained values in their own type, ``[n]``.
        changes: of each model.
        kept: of each model, positions int64; ``None`` for all.
        factors: of each model, for rescaling alone: ``1 / q`` or 1.
        weights: of each model, not negative.
        scale: of the elected mean.
        out: a copy of the base in the type of the result, ``[n]``; edited in place.

    Example:
        >>> base = torch.zeros(2)
        >>> changes = [Change(base, torch.tensor(t)) for t in ([3.0, 1.0], [-1.0, 2.0])]
        >>> out = base.clone()
        >>> elect(base, changes, [None, None], [1.0, 1.0], [1.0, 1.0], 1.0, out)
        >>> out
        tensor([3.0000, 1.5000])
    """
    wide = _wide(changes)
    values = [
        change.at(mine).to(wide).mul_(factor)
        for change, mine, factor in zip(changes, kept, factors, strict=True)
    ]
    sums, total, share = (torch.zeros(len(base), dtype=wide) for _ in range(3))
    for value, mine, weight in zip(values, kept, weights, strict=True):
        _add_at(sums, mine, value * weight)
    for value, mine, weight in zip(values, kept, weights, strict=True):
        plus = _pick(sums, mine) >= 0
        agrees = torch.where(plus, value, -value).gt_(0).mul_(weight)
        _add_at(share, mine, agrees)
        _add_at(total, mine, agrees.mul_(value))
    # Positions of two models are written twice, with one value: cheaper than their union.
    for where in [None] if any(k is None for k in kept) else kept:
        votes = _pick(share, where)
        mean = _pick(total, where) / votes.masked_fill(votes == 0, 1.0)
        _put(out, where, mean.mul_(scale).add_(_pick(base, where)))


def _wide(changes: Sequence[Change]) -> torch.dtype:
    wide = torch.float32
    for change in changes:
        wide = torch.promote_types(wide, change.wide)
    return wide


def _pick(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else values.index_select(0, kept)


def _add_at(total: Tensor, where: Tensor | None, values: Tensor) -> None:
    if where is None:
        total += values
    else:
        total.index_add_(0, where, values)


def _put(out: Tensor, where: Tensor | None, values: Tensor) -> None:
    values = values.to(out.dtype)
    if where is None:
        out.copy_(values)
    else:
        out.index_copy_(0, where, values)
