"""One merge, as a function from a piece of a tensor to the piece's new values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from guywire.core.headers import DTYPES
from guywire.methods.merging import _dense, edits
from guywire.methods.merging._limits import STRIDE, Limit, Run, find_limits
from guywire.methods.merging.files import Checkpoint
from guywire.methods.merging.importance import wanda_mask
from guywire.methods.merging.masks import BLOCK
from guywire.methods.merging.matching import Item, Part

Piece = tuple[int, int]


@dataclass(frozen=True)
class Inputs:
    """What a linear layer gets on calibration data.

    Attributes:
        rows: some of its inputs, ``[n, in]``.
        norms: of each input feature, ``[in]``.
        transposed: the weight is ``[in, out]``; ``None`` if that is to be seen from its shape.
        ones: there is no data, every feature counts as 1.
    """

    rows: Tensor
    norms: Tensor
    transposed: bool | None = None
    ones: bool = False

    def turned(self, shape: Sequence[int]) -> bool | None:
        """Tell whether a weight is ``[in, out]``; ``None`` if the inputs do not fit it at all."""
        width = len(self.norms)
        if self.transposed is not None and shape[0 if self.transposed else 1] == width:
            return self.transposed
        return False if shape[1] == width else True if shape[0] == width else None


@dataclass
class Editor:
    """Everything that a piece's new values depend on.

    Attributes:
        base: the pretrained model.
        method: of the merge.
        rate: share that is dropped; 0 for methods that do not prune.
        seed: of the survivors.
        weights: of the models.
        scale: of the sum.
        models: how many.
        qs: (model, base name) to q, where it is not ``1 - rate``.
        inputs: (model, base name) to calibration inputs.
        limits: (model, item name) to limits, filled by :meth:`prepare`.
    """

    base: Checkpoint
    method: edits.Method
    rate: float
    seed: int
    weights: tuple[float, ...]
    scale: float
    models: int
    qs: Mapping[tuple[int, str], float] = field(default_factory=dict)
    inputs: Mapping[tuple[int, str], Inputs] = field(default_factory=dict)
    limits: dict[tuple[int, str], Limit] = field(default_factory=dict)

    def pieces(self, item: Item) -> list[Piece]:
        """Cut a tensor into pieces that are edited on their own.

        Args:
            item: the tensor.

        Returns:
            (start, stop) in order; blocks of the draw, or whole rows where rows are ranked.
        """
        step = BLOCK
        if item.pruned and self.method.prune == "wanda" and (seen := self._seen(item)):
            turned = seen.turned(item.shape)
            step = item.numel if turned else max(1, BLOCK // item.shape[1]) * item.shape[1]
        size = item.numel
        return [(at, min(at + step, size)) for at in range(0, size, max(1, step))]

    def prepare(self, item: Item, run: Run) -> None:
        """Look through a tensor as a whole, where its method ranks the whole of it.

        Args:
            item: the tensor.
            run: maps a function over pieces, in order.
        """
        if not item.pruned or self.method.prune not in ("magnitude", "wanda") or not item.common:
            return
        pieces = [(a, min(b, item.common)) for a, b in self.pieces(item) if a < item.common]
        count = round((1.0 - self.rate) * item.common)
        wanda = self.method.prune == "wanda"
        parts = [p for p in item.parts if not wanda or self._inputs(p, item) is None]
        if not parts:
            return

        def deltas(slices: Sequence[Piece]) -> list[Tensor]:
            return [change.at() for change in self._changes(item, slices, parts, widen=True)]

        found = find_limits(deltas, len(parts), pieces, count, run, _stride(item))
        for part, limit in zip(parts, found, strict=True):
            self.limits[part.model, item.name] = limit

    def edit(
        self, item: Item, start: int, stop: int, *, places: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new values of a piece.

        Args:
            item: the tensor.
            start: first element.
            stop: after the last one.
            places: say where the piece may differ from the base.

        Returns:
            The values in the result's type, and with ``places`` the positions in the piece that may
            differ from the base; ``None`` for all.
        """
        split = max(start, min(stop, item.common)) if item.base is not None else start
        if split == start and start < stop:
            return self._own(item, start, stop), None
        assert item.base is not None
        if not item.parts:
            before = self.base.read(item.base.name, start, split)
            return self._joined(item, before, split, stop), torch.empty(0, dtype=torch.int64)
        limits = [self.limits.get((part.model, item.name)) for part in item.parts]
        if not places and None not in limits:
            ranked = self._ranked(item, [lim for lim in limits if lim is not None], start, split)
            return self._joined(item, ranked, split, stop), None
        changes = self._changes(item, [(start, split)])
        before = changes[0].base
        out = before.to(DTYPES[item.dtype], copy=True)
        if item.pruned:
            kept = self._kept(item, changes, start, split)
            where = edits.touched(kept, len(before)) if places and split == stop else None
            self._combine(item, before, changes, kept, out)
        else:
            edits.add(before, changes, [None] * len(changes), self._shares(item), out)
            where = None
        return self._joined(item, out, split, stop), where

    def change(self, item: Item, part: Part, start: int, stop: int) -> Tensor:
        """Return the change that one model makes to a piece.

        Args:
            item: the tensor.
            part: the model's.
            start: first element.
            stop: after the last one.

        Returns:
            At least float32, ``[stop - start]``.
        """
        return self._change(item, part, [(start, stop)]).at()

    def _joined(self, item: Item, out: Tensor, split: int, stop: int) -> Tensor:
        return out if split == stop else torch.cat([out, self._own(item, split, stop)])

    def _own(self, item: Item, start: int, stop: int) -> Tensor:
        part = item.own
        assert part.entry is not None
        assert part.owner is not None
        return part.owner.read(part.entry.name, start, stop).to(DTYPES[item.dtype])

    def _changes(
        self,
        item: Item,
        slices: Sequence[Piece],
        parts: Sequence[Part] | None = None,
        *,
        widen: bool = False,
    ) -> list[edits.Change]:
        assert item.base is not None
        before = self.base.gather(item.base.name, slices)
        chosen = item.parts if parts is None else parts
        changes = [self._change(item, part, slices, before) for part in chosen]
        if widen and all(change.wide == torch.float32 for change in changes):
            wide = before.float()
            changes = [dataclasses.replace(change, widened=wide) for change in changes]
        return changes

    def _change(
        self, item: Item, part: Part, slices: Sequence[Piece], before: Tensor | None = None
    ) -> edits.Change:
        assert item.base is not None
        before = self.base.gather(item.base.name, slices) if before is None else before
        if part.factors is not None:
            rows = [part.factors.rows(start, stop) for start, stop in slices]
            return edits.Change(before, None, rows[0] if len(rows) == 1 else torch.cat(rows))
        assert part.entry is not None
        assert part.owner is not None
        return edits.Change(before, part.owner.gather(part.entry.name, slices))

    def _ranked(self, item: Item, limits: Sequence[Limit], start: int, stop: int) -> Tensor:
        """Edit a piece whose survivors the limits tell, in strides that stay in the cache."""
        out = torch.empty(stop - start, dtype=DTYPES[item.dtype])
        ties = [limit.ties.get(start, 0) for limit in limits]
        step = _stride(item)
        for at in range(start, stop, step):
            changes = self._changes(item, [(at, min(at + step, stop))], widen=True)
            before = changes[0].base
            values = out[at - start : at - start + len(before)].copy_(before)
            deltas = [change.at() for change in changes]
            if all(delta.dtype == torch.float32 for delta in deltas):
                masks: list[np.ndarray] = []
                for i, delta in enumerate(deltas):
                    deltas[i], mask, ties[i] = _dense.prune(delta, limits[i], ties[i])
                    masks.append(mask)
                _dense.put(values, masks, self._together(item, changes, deltas))
                continue
            kept: list[Tensor | None] = []
            for i, delta in enumerate(deltas):
                mine, ties[i] = limits[i].first(delta, ties[i])
                kept.append(mine)
            self._combine(item, before, changes, kept, values)
        return out

    def _together(
        self, item: Item, changes: Sequence[edits.Change], deltas: Sequence[Tensor]
    ) -> Tensor:
        """Put pruned changes together, which methods that rank do not rescale."""
        shares = self._shares(item)
        before = changes[0].base if changes[0].widened is None else changes[0].widened
        if self.method.elects:
            weights = [self.weights[part.model] for part in item.parts]
            return _dense.elected(before, deltas, weights, self.scale)
        if shares == [1.0] and changes[0].tuned is not None:
            return changes[0].tuned
        return _dense.added(before, deltas, shares)

    def _combine(
        self,
        item: Item,
        before: Tensor,
        changes: list[edits.Change],
        kept: list[Tensor | None],
        out: Tensor,
    ) -> None:
        assert item.base is not None
        numbers = [part.model for part in item.parts]
        rescale = [1.0 / self._q(i, item.base.name) for i in numbers]
        if self.method.elects:
            weights = [self.weights[i] for i in numbers]
            edits.elect(before, changes, kept, rescale, weights, self.scale, out)
        else:
            factors = [s * r for s, r in zip(self._shares(item), rescale, strict=True)]
            edits.add(before, changes, kept, factors, out)

    def _shares(self, item: Item) -> list[float]:
        """Weights for adding; where signs are elected weights are relative."""
        total = sum(self.weights) if self.method.elects else 1.0
        return [self.weights[part.model] / total * self.scale for part in item.parts]

    def _q(self, model: int, name: str) -> float:
        if self.method.rescales is None:
            return 1.0
        return self.qs.get((model, name), 1.0 - self.rate)

    def _kept(
        self, item: Item, changes: list[edits.Change], start: int, stop: int
    ) -> list[Tensor | None]:
        if self.method.prune == "none" or self.rate == 0.0:
            return [None] * len(changes)
        if self.method.prune == "random":
            drawn = [
                edits.draw(item.mask, part.model, self.rate, self.seed, item.numel, start, stop)
                for part in item.parts
            ]
            return list(drawn)
        kept: list[Tensor | None] = []
        for part, change in zip(item.parts, changes, strict=True):
            limit = self.limits.get((part.model, item.name))
            if limit is not None:
                kept.append(limit.kept(change.at(), start))
                continue
            seen = self._inputs(part, item)
            assert seen is not None
            delta = change.at()
            if seen.turned(item.shape):
                mask = wanda_mask(delta.view(item.shape).T, seen.norms, self.rate).T.reshape(-1)
            else:
                mask = wanda_mask(delta.view(-1, item.shape[1]), seen.norms, self.rate).view(-1)
            kept.append(torch.from_numpy(np.flatnonzero(mask.numpy())))
        return kept

    def _inputs(self, part: Part, item: Item) -> Inputs | None:
        assert item.base is not None
        seen = self.inputs.get((part.model, item.base.name))
        whole = len(item.shape) == 2 and item.common == item.numel
        return seen if seen is not None and whole and seen.turned(item.shape) is not None else None

    def _seen(self, item: Item) -> Inputs | None:
        found = (self._inputs(part, item) for part in item.parts)
        return next((seen for seen in found if seen is not None), None)


def _stride(item: Item) -> int:
    """An adapter's change is a product of matrices, which is cut as rarely as can be."""
    return STRIDE if all(part.factors is None for part in item.parts) else max(1, item.numel)
