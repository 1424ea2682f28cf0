"""Batches as rows: take them apart, keep rows, put them together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from guywire.core.errors import CheckpointError, DataError
from guywire.core.tensors import Tensors

PAIR, TUPLE, DICT = "pair", "tuple", "dict"


def apart(batch: Any) -> tuple[str, Tensors]:
    """Take a batch apart into named tensors with one row a sample, on the CPU.

    Args:
        batch: a pair ``(inputs, labels)``, inputs a tensor or a tuple of them; or a dict.

    Returns:
        What kind of batch it was, and the tensors.

    Raises:
        DataError: it is no batch, or its tensors have different numbers of rows.
    """
    if isinstance(batch, Mapping):
        kind, fields = DICT, {k: v for k, v in batch.items() if isinstance(v, Tensor)}
    elif isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        several = isinstance(batch[0], tuple | list)
        kind = TUPLE if several else PAIR
        inputs = batch[0] if several else [batch[0]]
        fields = {f"input{i}": value for i, value in enumerate(inputs)} | {"labels": batch[1]}
    else:
        raise DataError(
            f"a memory keeps pairs (inputs, labels) or dicts with 'labels', not a "
            f"{type(batch).__name__}"
        )
    if "labels" not in fields or not all(isinstance(v, Tensor) for v in fields.values()):
        raise DataError(
            f"a batch with {sorted(fields)} has no 'labels', or inputs that are no tensors"
        )
    counts = {len(v) for v in fields.values()}
    if len(counts) != 1:
        raise DataError(
            f"the tensors of one batch have different numbers of rows: {sorted(counts)}"
        )
    return kind, {k: v.detach().cpu() for k, v in fields.items()}


def together(kind: str, fields: Tensors) -> Any:
    """Put a batch together again.

    Args:
        kind: from :func:`apart`.
        fields: named tensors.

    Returns:
        The batch.
    """
    if kind == DICT:
        return _trim(dict(fields))
    inputs = [fields[f"input{i}"] for i in range(len(fields) - 1)]
    return (tuple(inputs) if kind == TUPLE else inputs[0]), fields["labels"]


class Store:
    """A fixed number of rows, written in place; made at the first write, in the shapes of its rows.

    Sequences in dicts are padded on the right where lengths differ.

    Args:
        capacity: rows.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.kind = PAIR
        self.fields: Tensors = {}

    def write(self, slots: Tensor, kind: str, fields: Tensors) -> None:
        """Write rows into slots.

        Args:
            slots: ``[n]``, distinct.
            kind: of the batch that the rows are from.
            fields: named tensors of ``n`` rows.

        Raises:
            DataError: names, types or shapes do not fit the rows that are here.
        """
        if not self.fields:
            self.kind = kind
            self.fields = {n: v.new_zeros((self.capacity, *v.shape[1:])) for n, v in fields.items()}
        for name, value in self._fit(fields).items():
            self.fields[name][slots] = value

    def batch(self, index: Tensor) -> Any:
        """Return some rows as a batch of the kind that came in.

        Args:
            index: ``[n]`` slots.

        Returns:
            The batch.
        """
        return together(self.kind, {name: value[index] for name, value in self.fields.items()})

    def compact(self, index: Tensor) -> None:
        """Move some rows to the front.

        Args:
            index: ``[n]`` slots, rising.
        """
        for value in self.fields.values():
            value[: len(index)] = value[index]

    def state_dict(self, count: int) -> dict[str, Any]:
        """Return the first rows.

        Args:
            count: how many.

        Returns:
            The state.
        """
        rows = {name: value[:count].clone() for name, value in self.fields.items()}
        return {"capacity": self.capacity, "kind": self.kind, "fields": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the rows back.

        Args:
            state: from ``state_dict``.

        Raises:
            CheckpointError: the capacity differs.
        """
        if state["capacity"] != self.capacity:
            raise CheckpointError(
                f"the saved memory has the capacity {state['capacity']}, this one {self.capacity}: "
                "use the same"
            )
        self.fields = {}
        if state["fields"]:
            count = len(next(iter(state["fields"].values())))
            self.write(torch.arange(count), state["kind"], state["fields"])

    def _fit(self, fields: Tensors) -> Tensors:
        if self.fields.keys() != fields.keys():
            raise DataError(
                f"the memory holds {sorted(self.fields)}, but the batch {sorted(fields)}"
            )
        for name, ours in self.fields.items():  # check all before changing any
            _check(self.kind, name, ours, fields[name], "attention_mask" in fields)
        out = {}
        for name, theirs in fields.items():
            ours = self.fields[name]
            if ours.shape[1:] != theirs.shape[1:]:
                length = max(ours.shape[1], theirs.shape[1])
                self.fields[name], theirs = _pad(name, ours, length), _pad(name, theirs, length)
            out[name] = theirs
        return out


def _check(kind: str, name: str, ours: Tensor, theirs: Tensor, masked: bool) -> None:
    if ours.dtype != theirs.dtype:
        raise DataError(f"{name!r} is {ours.dtype} in the memory but {theirs.dtype} in the batch")
    if ours.shape[1:] == theirs.shape[1:]:
        return
    sequences = ours.dim() == theirs.dim() >= 2 and ours.shape[2:] == theirs.shape[2:]
    if not (kind == DICT and sequences and masked):
        raise DataError(
            f"{name!r} has rows of shape {tuple(ours.shape[1:])} in the memory but "
            f"{tuple(theirs.shape[1:])} in the batch: give one shape, or dicts with 'attention_mask'"
        )


def _pad(name: str, rows: Tensor, length: int) -> Tensor:
    if rows.shape[1] == length:
        return rows
    filler = -100 if name == "labels" else 0
    padding = rows.new_full((len(rows), length - rows.shape[1], *rows.shape[2:]), filler)
    return torch.cat([rows, padding], dim=1)


def _trim(fields: Tensors) -> Tensors:
    """Cut off columns on the right that no row attends to."""
    mask = fields.get("attention_mask")
    if mask is None or mask.dim() != 2 or not bool(mask.any()):
        return fields
    length = int(mask.any(0).nonzero().max()) + 1
    width = mask.shape[1]
    return {
        n: v[:, :length] if v.dim() > 1 and v.shape[1] == width else v for n, v in fields.items()
    }
