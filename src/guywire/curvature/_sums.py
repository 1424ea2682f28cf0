"""What is made of per-sample gradients: here, the sum of their squares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from guywire.core import batches
from guywire.curvature._pieces import Piece, Rows, combine, disjoint
from guywire.curvature._routes import Routes

__all__ = ["Sums"]


class Sums(Routes):
    """The sums that a recorder gathers, one for each parameter.

    Args:
        model: the unwrapped model.
        names: (module, local name) to canonical name, for the parameters wanted.
        dtypes: canonical name to the type of its sum.
        shapes: canonical name to the parameter's shape.
    """

    sharded = True
    """Whether sums have the parameters' shapes, and so can be sharded like them."""

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[tuple[nn.Module, str], str],
        dtypes: Mapping[str, torch.dtype],
        shapes: Mapping[str, torch.Size],
    ) -> None:
        super().__init__(model, names)
        self.dtypes, self.shapes = dtypes, shapes
        self.totals: dict[str, Tensor] = {}

    def zero(self, name: str) -> Tensor:
        """Return the sum of nothing for a parameter.

        Args:
            name: the parameter's.

        Returns:
            Zeros.
        """
        device = batches.device_of(self.model)
        return torch.zeros(self.shapes[name], dtype=self.dtypes[name], device=device)

    def separable(self, uses: list[Rows]) -> bool:
        """Say whether the uses of a parameter in one pass can be added one by one.

        Args:
            uses: the rows that each touches.

        Returns:
            True if they touch rows of their own.
        """
        return len(uses) == 1 or disjoint(uses)

    def add(self, name: str, piece: Piece, rows: Rows) -> None:
        """Add what the gradients of one use amount to.

        Args:
            name: the parameter's.
            piece: the gradients.
            rows: which of the parameter's they are; ``None`` for all.
        """
        total = self._total(name)
        piece.square_into(total if rows is None else total[rows[0] : rows[1]])

    def add_sum(self, name: str, pieces: list[Piece]) -> None:
        """Add what the sum of the gradients of several uses amounts to.

        Args:
            name: the parameter's.
            pieces: the gradients of each use.
        """
        combine(pieces, self._total(name))

    def _total(self, name: str) -> Tensor:
        if name not in self.totals:
            self.totals[name] = self.zero(name)
        return self.totals[name]
