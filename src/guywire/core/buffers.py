"""Memories of past samples: a uniform sample of the stream, or as much of every class.

Both are deterministic given the generator, keep tensors on the CPU in the type they came in, and
take any batch: pairs, tuples of inputs, Hugging Face dicts with sequences of different lengths
(padded on the right; columns that no drawn row attends to are cut off again).

Sources: reservoir sampling is algorithm R, Vitter 1985. The class-balanced memory keeps, of every
class, the rows with the smallest random keys, so that it is a uniform sample of the class at any
time however the quota shrinks.
"""

from __future__ import annotations

from typing import Any, Protocol, final

import torch
from torch import Tensor

from guywire.core import _rows
from guywire.core.errors import UsageError

__all__ = ["BalancedBuffer", "Buffer", "ReservoirBuffer"]


class Buffer(Protocol):
    """What a memory offers."""

    def __len__(self) -> int: ...

    def add(self, batch: Any, generator: torch.Generator) -> None:
        """Offer the samples of a batch to the memory."""
        ...

    def draw(self, count: int, generator: torch.Generator) -> Any | None:
        """Return a batch of samples without replacement, or ``None`` from an empty memory."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the contents."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the contents back."""
        ...


@final
class ReservoirBuffer:
    """A uniform sample of everything offered so far.

    Args:
        capacity: samples to keep, at least 1.

    Raises:
        UsageError: the capacity is smaller.

    Example:
        >>> buffer, generator = ReservoirBuffer(3), torch.Generator().manual_seed(0)
        >>> buffer.add((torch.arange(10.0), torch.arange(10)), generator)
        >>> len(buffer), buffer.seen
        (3, 10)
    """

    def __init__(self, capacity: int) -> None:
        _check(capacity)
        self.capacity = capacity
        self.seen = 0
        self._store = _rows.Store(capacity)

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def add(self, batch: Any, generator: torch.Generator) -> None:
        """Offer the samples of a batch: sample number ``t`` stays with probability ``capacity/t``.

        Args:
            batch: the batch.
            generator: of the choice, on the CPU.

        Raises:
            DataError: it does not fit what the memory holds.
        """
        kind, fields = _rows.apart(batch)
        count = len(fields["labels"])
        times = torch.arange(self.seen, self.seen + count)
        chance = torch.rand(count, generator=generator, dtype=torch.float64)
        slots = torch.where(times < self.capacity, times, (chance * (times + 1)).long())
        kept = (slots < self.capacity).nonzero().flatten()
        if len(kept):
            # Of samples in this batch that fall on one slot, the last stays, as one by one.
            source = torch.full((self.capacity,), -1)
            source.scatter_reduce_(0, slots[kept], kept, "amax")
            target = (source >= 0).nonzero().flatten()
            chosen = {name: value[source[target]] for name, value in fields.items()}
            self._store.write(target, kind, chosen)
        self.seen += count

    def draw(self, count: int, generator: torch.Generator) -> Any | None:
        """Return samples, uniformly and without replacement.

        Args:
            count: how many; all if the memory holds fewer.
            generator: of the choice.

        Returns:
            A batch on the CPU, or ``None`` if the memory is empty.
        """
        if len(self) == 0:
            return None
        chosen = torch.randperm(len(self), generator=generator)[:count]
        return self._store.batch(chosen)

    def state_dict(self) -> dict[str, Any]:
        """Return the contents.

        Returns:
            The state.
        """
        return self._store.state_dict(len(self)) | {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the contents back.

        Args:
            state: from ``state_dict``.

        Raises:
            CheckpointError: the capacity differs.
        """
        self._store.load_state_dict(state)
        self.seen = int(state["seen"])


@final
class BalancedBuffer:
    """An equal share of every class offered so far, uniform inside each class.

    The quota is ``capacity // classes``; what is left over goes to the lowest class numbers, one
    each. A class with fewer samples than its quota leaves room unused.

    Args:
        capacity: samples to keep, at least 1.

    Raises:
        UsageError: the capacity is smaller.

    Example:
        >>> buffer, generator = BalancedBuffer(4), torch.Generator().manual_seed(0)
        >>> buffer.add((torch.zeros(10, 1), torch.tensor([0] * 8 + [1] * 2)), generator)
        >>> sorted(buffer.labels.tolist())
        [0, 0, 1, 1]
    """

    def __init__(self, capacity: int) -> None:
        _check(capacity)
        self.capacity = capacity
        self._store = _rows.Store(capacity)
        self._keys = torch.zeros(0, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def labels(self) -> Tensor:
        """The labels held, ``[held]``."""
        labels = self._store.fields.get("labels")
        return torch.zeros(0, dtype=torch.long) if labels is None else labels[: len(self)]

    def add(self, batch: Any, generator: torch.Generator) -> None:
        """Offer the samples of a batch.

        Args:
            batch: the batch, with one label a sample.
            generator: of the choice, on the CPU.

        Raises:
            DataError: it does not fit what the memory holds.
            UsageError: there is more than one label a sample.
        """
        kind, fields = _rows.apart(batch)
        if fields["labels"].dim() != 1 or fields["labels"].is_floating_point():
            raise UsageError(
                "a balanced memory needs one class number a sample: use buffer='reservoir' for "
                "sequences of labels and for regression"
            )
        held, count = len(self), len(fields["labels"])
        fresh = torch.rand(count, generator=generator, dtype=torch.float64)
        keys, labels = torch.cat([self._keys, fresh]), torch.cat([self.labels, fields["labels"]])
        kept = torch.zeros(held + count, dtype=torch.bool)
        kept[_smallest(labels, keys, self.capacity)] = True
        coming = kept[held:].nonzero().flatten()
        freed = (~kept[:held]).nonzero().flatten()
        slots = torch.cat([freed, torch.arange(held, self.capacity)])[: len(coming)]
        if len(coming):
            self._store.write(slots, kind, {name: value[coming] for name, value in fields.items()})
        keys = torch.cat([self._keys, fresh.new_zeros(self.capacity - held)])
        keys[slots] = fresh[coming]
        live = torch.arange(self.capacity) < held
        live[freed], live[slots] = False, True
        index = live.nonzero().flatten()
        if len(index) and int(index[-1]) >= len(index):  # a new class took more than it brought
            self._store.compact(index)
        self._keys = keys[index]

    def draw(self, count: int, generator: torch.Generator) -> Any | None:
        """Return samples: a class drawn uniformly for each, without replacement.

        Args:
            count: how many; all if the memory holds fewer.
            generator: of the choice.

        Returns:
            A batch on the CPU, or ``None`` if the memory is empty.
        """
        if len(self) == 0:
            return None
        # Give each class a clock that ticks at rate 1 and takes its next sample, in random order,
        # at each tick. The order of the ticks is a uniform draw among classes that are not used up.
        order = _by_class(
            self.labels, torch.rand(len(self), generator=generator, dtype=torch.float64)
        )
        counts = self.labels[order].unique_consecutive(return_counts=True)[1]
        waits = torch.empty(len(self), dtype=torch.float64).exponential_(generator=generator)
        total = waits.cumsum(0)
        starts = counts.cumsum(0) - counts
        before = (total - waits)[starts].repeat_interleave(counts)
        chosen = order[(total - before).argsort(stable=True)[:count]]
        return self._store.batch(chosen)

    def state_dict(self) -> dict[str, Any]:
        """Return the contents.

        Returns:
            The state.
        """
        return self._store.state_dict(len(self)) | {"keys": self._keys}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the contents back.

        Args:
            state: from ``state_dict``.

        Raises:
            CheckpointError: the capacity differs.
        """
        self._store.load_state_dict(state)
        self._keys = state["keys"].clone()


def _check(capacity: int) -> None:
    if capacity < 1:
        raise UsageError(f"capacity={capacity} must be at least 1 sample")


def _smallest(labels: Tensor, keys: Tensor, capacity: int) -> Tensor:
    """Return the rows to keep: of every class those with the smallest keys, to its quota."""
    order = _by_class(labels, keys)
    classes, counts = labels[order].unique_consecutive(return_counts=True)
    quota = torch.full_like(counts, capacity // max(1, len(classes)))
    quota[: capacity % max(1, len(classes))] += 1
    return order[_rank(counts) < quota.repeat_interleave(counts)]


def _by_class(labels: Tensor, keys: Tensor) -> Tensor:
    order = keys.argsort(stable=True)
    return order[labels[order].argsort(stable=True)]


def _rank(counts: Tensor) -> Tensor:
    """Return 0, 1, ... inside each run of equal labels."""
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.arange(len(starts)) - starts
