"""Accumulators: values gathered over batches, in one shape for all that gather them.

Each state is declared with its zero and with how it reduces over processes; ``update`` takes a
batch, ``compute`` gives the answer. Reset, checkpoints and the reduction over processes are here,
once.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from guywire.core.errors import CheckpointError, UsageError

__all__ = ["Accumulator", "Reduction"]

Reduction = Literal["sum", "mean", "max", "cat"]


class Accumulator:
    """Base of what gathers values over batches: declare states, then update and compute.

    A subclass calls ``declare`` in its constructor, and implements ``update`` and ``compute``. The
    states are plain attributes.

    Example:
        >>> class Mean(Accumulator):
        ...     def __init__(self):
        ...         self.declare("total", torch.zeros(()), "sum")
        ...         self.declare("count", torch.zeros(()), "sum")
        ...
        ...     def update(self, values):
        ...         self.total += values.sum()
        ...         self.count += values.numel()
        ...
        ...     def compute(self):
        ...         return self.total / self.count
        >>> mean = Mean()
        >>> mean.update(torch.tensor([1.0, 2.0]))
        >>> mean.update(torch.tensor([6.0]))
        >>> mean.compute()
        tensor(3.)
    """

    _declared: dict[str, tuple[Tensor, Reduction]]

    def declare(self, name: str, zero: Tensor, reduction: Reduction) -> None:
        """Declare a state.

        Args:
            name: of the attribute.
            zero: its value before the first update; a copy is kept. States that are concatenated
                start with no rows.
            reduction: how the values of several processes become one.

        Raises:
            UsageError: the reduction is unknown, the name is taken, or a state to be concatenated
                is 0-d.
        """
        declared = self.__dict__.setdefault("_declared", {})
        if reduction not in ("sum", "mean", "max", "cat"):
            raise UsageError(f"reduction {reduction!r}: use 'sum', 'mean', 'max' or 'cat'")
        if name in declared or hasattr(self, name):
            raise UsageError(f"the state {name!r} is declared already: choose another name")
        if reduction == "cat" and zero.dim() == 0:
            raise UsageError(f"the state {name!r} is 0-d and cannot be concatenated: give it rows")
        declared[name] = (zero.detach().clone(), reduction)
        setattr(self, name, zero.detach().clone())

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in a batch.

        Args:
            *args: as the subclass says.
            **kwargs: as the subclass says.

        Raises:
            NotImplementedError: the subclass has no ``update``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement update()")

    def compute(self) -> Any:
        """Return the answer from the states as they are.

        Returns:
            As the subclass says.

        Raises:
            NotImplementedError: the subclass has no ``compute``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement compute()")

    def reset(self) -> None:
        """Set every state to its zero."""
        for name, (zero, _) in self._declared.items():
            setattr(self, name, zero.clone())

    def to(self, device: torch.device | str) -> None:
        """Move the states, and the zeros that ``reset`` gives.

        Args:
            device: where to.
        """
        for name, (zero, reduction) in list(self._declared.items()):
            self._declared[name] = (zero.to(device), reduction)
            setattr(self, name, getattr(self, name).to(device))

    def reduce(self, group: Any = None) -> None:
        """Make the states those of all processes together; every process must call it, once.

        Does nothing where ``torch.distributed`` is not initialised.

        Args:
            group: a process group; all processes if ``None``.
        """
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return
        world = distributed.get_world_size(group)
        for name, (_, reduction) in self._declared.items():
            state: Tensor = getattr(self, name).contiguous()
            if reduction == "cat":
                setattr(self, name, _gathered(state, world, group))
                continue
            op = distributed.ReduceOp.MAX if reduction == "max" else distributed.ReduceOp.SUM
            distributed.all_reduce(state, op=op, group=group)
            setattr(self, name, state.div_(world) if reduction == "mean" else state)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the states.

        Returns:
            Names to tensors.
        """
        return {name: getattr(self, name).detach().clone() for name in self._declared}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state_dict`` gave.

        Args:
            state: names to tensors.

        Raises:
            CheckpointError: names or shapes are not those declared.
        """
        if state.keys() != self._declared.keys():
            raise CheckpointError(
                f"the saved states are {sorted(state)}, but {type(self).__name__} has "
                f"{sorted(self._declared)}"
            )
        for name, (zero, reduction) in self._declared.items():
            skip = 1 if reduction == "cat" else 0
            if state[name].shape[skip:] != zero.shape[skip:]:
                raise CheckpointError(
                    f"the saved state {name!r} has shape {tuple(state[name].shape)}, "
                    f"not {tuple(zero.shape)}"
                )
            setattr(self, name, state[name].detach().clone().to(zero))


def _gathered(state: Tensor, world: int, group: Any) -> Tensor:
    from torch import distributed

    rows = torch.tensor([state.shape[0]], device=state.device)
    counts = [torch.zeros_like(rows) for _ in range(world)]
    distributed.all_gather(counts, rows, group=group)
    most = int(torch.stack(counts).max())
    padded = state.new_zeros((most, *state.shape[1:]))
    padded[: state.shape[0]] = state
    parts = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])
