"""Per-sample gradients of one parameter from one use of it, and the sum of their squares.

A piece knows the gradients of N samples without holding them. ``rows(lo, hi)`` forms some of them;
``square_into(total)`` adds the sum of their squares to ``total``, by the cheapest exact way:

- `Outer`: the gradient of a sample is L R^T, with L [M, T] and R [K, T] over T positions. With one
  position sum_n (l_n r_n^T)^2 = (l^2)^T (r^2): one matrix product, nothing per sample. With few
  positions, (sum_t l_t r_t)^2 = sum_{s<=t} (2 - [s=t]) l_s l_t r_s r_t: one product over the pairs.
  Otherwise the gradients are formed in a reused buffer, a sample (or a few) at a time.
- `Scatter`: an embedding's gradient touches only the rows of a sample's tokens.
- `Direct`: the gradients themselves, where they are small (norms, biases).

A parameter used more than once has the square of the *sum* of its pieces: ``combine``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "BUFFER",
    "Direct",
    "Lazy",
    "Outer",
    "Piece",
    "Rows",
    "Scatter",
    "combine",
    "disjoint",
    "joined",
    "widened",
]

Rows = tuple[int, int] | None

# Elements of the buffer in which per-sample gradients are formed (16 MB in float32).
BUFFER = 1 << 22
# Where a layer is small, as many samples go into one batched product as fill this.
SMALL = 1 << 16
# Pairs of positions beyond the positions themselves that a matrix product takes on in the time of
# one pass of squares over a gradient.
PAIRS = 12


class Piece:
    """Gradients of N samples with respect to one parameter, or some of its rows."""

    count: int
    shape: torch.Size

    def rows(self, lo: int, hi: int) -> Tensor:
        """Return the gradients of samples lo to hi, ``[hi - lo, *shape]``."""
        raise NotImplementedError

    def square_into(self, total: Tensor) -> None:
        """Add the sum over samples of squared gradients to ``total``, of the parameter's shape."""
        _square_rows([self], total)


class Direct(Piece):
    """Gradients that are there: ``[N, *shape]``."""

    def __init__(self, gradients: Tensor, total_dtype: torch.dtype) -> None:
        self.gradients = gradients.to(total_dtype)
        self.count, self.shape = gradients.shape[0], gradients.shape[1:]

    def rows(self, lo: int, hi: int) -> Tensor:
        """Return a slice."""
        return self.gradients[lo:hi]

    def square_into(self, total: Tensor) -> None:
        """Add the squares."""
        total += self.gradients.square().sum(0)


class Lazy(Piece):
    """Gradients that a function forms for a range of samples."""

    def __init__(
        self, form: Callable[[int, int], Tensor], count: int, shape: torch.Size, size: int
    ) -> None:
        self.form, self.count, self.shape, self.size = form, count, shape, size

    def rows(self, lo: int, hi: int) -> Tensor:
        """Call the function."""
        return self.form(lo, hi)


class Outer(Piece):
    """Gradients ``sum_t left[n, g, :, t] right[n, g, :, t]^T`` in each of g groups.

    Args:
        left: ``[N, G, M, T]``, any strides.
        right: a function of (lo, hi) giving ``[hi - lo, G, K, T]``.
        shape: of the parameter: ``G * M * K`` elements, ordered as ``[G, M, K]``.
        total_dtype: of the sum.
    """

    def __init__(
        self,
        left: Tensor,
        right: Callable[[int, int], Tensor],
        shape: torch.Size,
        total_dtype: torch.dtype,
    ) -> None:
        self.left, self.right, self.shape, self.dtype = left, right, shape, total_dtype
        self.count, self.groups, self.m, self.t = left.shape
        self.k = shape.numel() // max(1, self.groups * self.m)

    def _left(self, lo: int, hi: int) -> Tensor:
        return self.left[lo:hi].to(self.dtype)

    def _right(self, lo: int, hi: int) -> Tensor:
        return self.right(lo, hi).to(self.dtype)

    def rows(self, lo: int, hi: int) -> Tensor:
        """Form some gradients."""
        product = torch.matmul(self._left(lo, hi), self._right(lo, hi).transpose(2, 3))
        return product.view(hi - lo, *self.shape)

    def square_into(self, total: Tensor) -> None:
        """Add the squares, by the way that fits the number of positions."""
        out = total.view(self.groups, self.m, self.k)
        pairs = self.t * (self.t + 1) // 2
        if self.t == 0 or self.count == 0 or out.numel() == 0:
            return
        if self.t == 1:
            self._products(out, self._left(0, self.count), self._right(0, self.count), square=True)
        elif pairs - self.t <= PAIRS and self.count * pairs * (self.m + self.k) <= 4 * BUFFER:
            self._pairs(out)
        elif self.m * self.k * self.groups <= SMALL or self.groups > 1:
            self._batched(out)
        else:
            self._one_by_one(out[0])

    def _products(self, out: Tensor, left: Tensor, right: Tensor, *, square: bool = False) -> None:
        # left [N, G, M, T], right [N, G, K, T] -> out[g] += sum over n and t
        left = left.permute(1, 2, 0, 3).reshape(self.groups, self.m, -1)
        right = right.permute(1, 0, 3, 2).reshape(self.groups, -1, self.k)
        if square:
            left, right = left.square(), right.square()
        if self.groups == 1:
            out[0].addmm_(left[0], right[0])
        else:
            out.baddbmm_(left, right)

    def _pairs(self, out: Tensor) -> None:
        left, right = self._left(0, self.count), self._right(0, self.count)
        i, j = torch.triu_indices(self.t, self.t, device=left.device)
        weight = torch.where(i == j, 1.0, 2.0).to(self.dtype)
        fresh = torch.zeros_like(out)
        self._products(
            fresh,
            (left[..., i] * left[..., j]).mul_(weight),
            right[..., i] * right[..., j],
        )
        out += fresh.clamp_(min=0.0)  # rounding may leave a sum of squares just below zero

    def _batched(self, out: Tensor) -> None:
        step = max(1, SMALL // max(1, out.numel()))
        for lo in range(0, self.count, step):
            hi = min(self.count, lo + step)
            right = self._right(lo, hi).transpose(2, 3)
            out += torch.matmul(self._left(lo, hi), right).square_().sum(0)

    def _one_by_one(self, out: Tensor) -> None:
        height = min(self.m, max(1, BUFFER // self.k))
        buffer = out.new_empty(height, self.k)
        for n in range(self.count):
            left, right = self._left(n, n + 1)[0, 0], self._right(n, n + 1)[0, 0].t()
            for r in range(0, self.m, height):
                part = out[r : r + height]
                product = torch.mm(left[r : r + height], right, out=buffer[: part.shape[0]])
                part.addcmul_(product, product)


class Scatter(Piece):
    """Gradients of an embedding: row ``ids[n, t]`` of sample n gets ``values[n, t]``.

    Args:
        ids: ``[N, T]``; negative ones are dropped.
        values: ``[N, T, D]``.
        shape: ``[V, D]``.
        total_dtype: of the sum.
    """

    def __init__(
        self, ids: Tensor, values: Tensor, shape: torch.Size, total_dtype: torch.dtype
    ) -> None:
        self.ids, self.values, self.shape, self.dtype = ids, values, shape, total_dtype
        self.count = ids.shape[0]

    def summed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return samples ``[U]``, rows ``[U]`` and gradients ``[U, D]``, each pair once."""
        flat = self.ids.reshape(-1)
        keep = flat >= 0
        sample = torch.arange(self.count, device=flat.device).repeat_interleave(self.ids.shape[1])
        key = sample[keep] * self.shape[0] + flat[keep]
        unique, index = key.unique(return_inverse=True)
        values = self.values.reshape(-1, self.shape[1]).to(self.dtype)
        if not bool(keep.all()):
            values = values[keep]
        summed = values.new_zeros(len(unique), self.shape[1]).index_add_(0, index, values)
        return unique // self.shape[0], unique % self.shape[0], summed

    def rows(self, lo: int, hi: int) -> Tensor:
        """Form some gradients, dense."""
        out = torch.zeros((hi - lo, *self.shape), dtype=self.dtype, device=self.values.device)
        part = Scatter(self.ids[lo:hi], self.values[lo:hi], self.shape, self.dtype)
        sample, row, summed = part.summed()
        out[sample, row] = summed
        return out

    def square_into(self, total: Tensor) -> None:
        """Add the squares to the rows that were touched."""
        _, row, summed = self.summed()
        total.index_add_(0, row, summed.square_())


def combine(pieces: Sequence[Piece], total: Tensor) -> None:
    """Add the sum over samples of the squared *sum* of several pieces of one parameter.

    Args:
        pieces: of the same samples and the same parameter.
        total: added to, of the parameter's shape.
    """
    if len(pieces) == 1:
        pieces[0].square_into(total)
        return
    outers = [p for p in pieces if isinstance(p, Outer)]
    scatters = [p for p in pieces if isinstance(p, Scatter)]
    plain = all(p.groups == 1 and p.left.shape[2] == outers[0].m for p in outers)
    if len(outers) + len(scatters) < len(pieces) or not plain:
        _square_rows(pieces, total)
    elif not scatters:
        joined(outers).square_into(total)
    else:
        scatter = Scatter(
            torch.cat([s.ids for s in scatters], 1),
            torch.cat([s.values for s in scatters], 1),
            scatters[0].shape,
            scatters[0].dtype,
        )
        if not outers:
            scatter.square_into(total)
        elif outers[0].m != scatter.shape[0]:
            _square_rows(pieces, total)
        else:
            _outer_and_scatter(joined(outers), scatter, total)


def disjoint(uses: list[Rows]) -> bool:
    """Say whether uses of one parameter touch rows of their own."""
    if any(rows is None for rows in uses):
        return False
    spans = sorted(rows for rows in uses if rows is not None)
    return all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def widened(piece: Piece, rows: tuple[int, int], shape: torch.Size) -> Piece:
    """Return a piece of some rows as one of the whole parameter."""

    def form(lo: int, hi: int) -> Tensor:
        part = piece.rows(lo, hi)
        out = part.new_zeros(hi - lo, *shape)
        out[:, rows[0] : rows[1]] = part
        return out

    return Lazy(form, piece.count, shape, shape.numel())


def joined(outers: Sequence[Outer]) -> Outer:
    """Return one piece for several uses of a weight: the sum runs over the positions of all."""
    if len(outers) == 1:
        return outers[0]

    def right(lo: int, hi: int) -> Tensor:
        return torch.cat([o._right(lo, hi) for o in outers], 3)

    left = torch.cat([o.left for o in outers], 3)
    return Outer(left, right, outers[0].shape, outers[0].dtype)


def _outer_and_scatter(outer: Outer, scatter: Scatter, total: Tensor) -> None:
    # (O + S)^2 = O^2 + S (2 O + S), and S lives on the rows of a sample's tokens only.
    fresh = torch.zeros_like(total)
    outer.square_into(fresh)
    sample, row, s = scatter.summed()
    for n in range(outer.count):
        here = sample == n
        if not bool(here.any()):
            continue
        left = outer._left(n, n + 1)[0, 0][row[here]]
        o = left @ outer._right(n, n + 1)[0, 0].t()
        fresh.index_add_(0, row[here], s[here] * (2 * o + s[here]))
    total += fresh.clamp_(min=0.0)


def _square_rows(pieces: Sequence[Piece], total: Tensor) -> None:
    count = pieces[0].count
    step = max(1, BUFFER // max(1, max(total.numel(), *(getattr(p, "size", 0) for p in pieces), 1)))
    for lo in range(0, count, step):
        hi = min(count, lo + step)
        gradient = pieces[0].rows(lo, hi)
        for piece in pieces[1:]:
            gradient = gradient + piece.rows(lo, hi)
        total += gradient.to(total.dtype).square().sum(0)
