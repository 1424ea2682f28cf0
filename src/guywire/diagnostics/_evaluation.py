"""Fixed evaluation sets, and the score of a model on several of them in few forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guywire.core import batches, losses
from guywire.core.aside import random_state_kept
from guywire.core.errors import DataError, UsageError

Score = Literal["accuracy", "negative_loss"] | Callable[[Tensor, Tensor], Tensor]
Forward = Callable[[nn.Module, Any], Any]


class EvaluationSets:
    """One fixed random subset a task, kept in memory.

    Args:
        evals: task names to a batch (a pair of tensors, a dict) or an iterable of batches.
        subset: samples to keep of each; ``None`` for all.
        seed: of the choice.
        score: of one sample.
        classes: task names to the columns that a prediction may take.
        forward: how to run the model on a batch.
        batch_size: samples in one forward pass, at most.
    """

    def __init__(
        self,
        evals: Mapping[str, Any],
        *,
        subset: int | None,
        seed: int,
        score: Score,
        classes: Mapping[str, Sequence[int]] | None,
        forward: Forward | None,
        batch_size: int,
    ) -> None:
        if not evals:
            raise UsageError("evals is empty: give a mapping from task names to evaluation data")
        self.score = _scorer(score)
        self.classes = classes or {}
        self.forward = batches.forward if forward is None else forward
        self.batch_size = batch_size
        self._sets = {
            name: _choose(name, data, subset, torch.Generator().manual_seed(seed + i))
            for i, (name, data) in enumerate(evals.items())
        }
        self.sizes = {name: sum(map(batches.size_of, s)) for name, s in self._sets.items()}
        self._plans: dict[tuple[Any, ...], list[_Piece]] = {}

    def evaluate(self, model: nn.Module, names: Sequence[str]) -> dict[str, float]:
        """Return the mean score on each set; the model is in eval mode, without autograd.

        Args:
            model: the user's module.
            names: which sets.

        Returns:
            Names to scores.
        """
        device = batches.device_of(model)
        sums: dict[str, Tensor] = {}
        for batch, spans in self._plan(tuple(names), device):
            logits = batches.logits_of(self.forward(model, batch))
            labels = batches.labels_of(batch)
            begin = 0
            for name, count in spans:
                part = logits[begin : begin + count]
                if name in self.classes:
                    part = losses.only(part, self.classes[name])
                scores = self.score(part, labels[begin : begin + count]).double().sum()
                sums[name] = sums[name] + scores if name in sums else scores
                begin += count
        # One transfer for all tasks.
        totals = torch.stack([sums[name] for name in names]).tolist()
        return {n: total / self.sizes[n] for n, total in zip(names, totals, strict=True)}

    def _plan(self, names: tuple[str, ...], device: torch.device) -> list[_Piece]:
        key = (names, device)
        if key not in self._plans:
            # Only the latest plan is kept: it holds a joined copy of the sets it covers.
            pieces = _join([(n, b) for n in names for b in self._sets[n]], self.batch_size)
            self._plans = {key: [(batches.to(b, device), spans) for b, spans in pieces]}
        return self._plans[key]


_Piece = tuple[Any, list[tuple[str, int]]]


def rows(batch: Any, index: Any) -> Any:
    """Return the same batch with only some rows of every tensor.

    Args:
        batch: tensors, or tuples, lists and dicts of them.
        index: a slice or a tensor of row numbers.

    Returns:
        The same structure.
    """
    if isinstance(batch, Tensor):
        return batch[index]
    if isinstance(batch, Mapping):
        return {key: rows(value, index) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(rows(value, index) for value in batch)
    return batch


def _scorer(score: Score) -> Callable[[Tensor, Tensor], Tensor]:
    if callable(score):
        return score
    if score == "accuracy":
        return _accuracy
    if score == "negative_loss":
        return _negative_loss
    raise UsageError(
        f"score={score!r} is none of 'accuracy', 'negative_loss' or a callable "
        "(logits, labels) -> one score a sample"
    )


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return _per_sample((logits.argmax(-1) == labels).double(), labels)


def _negative_loss(logits: Tensor, labels: Tensor) -> Tensor:
    flat = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return _per_sample(-flat.view_as(labels), labels)


def _per_sample(values: Tensor, labels: Tensor) -> Tensor:
    """Average over the tokens that count; -100 marks those that do not."""
    if labels.dim() < 2:
        return values
    counts = (labels != -100).flatten(1)
    return (values.flatten(1) * counts).sum(1) / counts.sum(1).clamp(min=1)


def _choose(name: str, data: Any, subset: int | None, generator: torch.Generator) -> list[Any]:
    single = isinstance(data, Mapping) or (
        isinstance(data, tuple | list)
        and len(data) == 2
        and isinstance(data[1], Tensor)
        and not isinstance(data[0], Mapping)
    )
    parts = [data] if single else _collect(name, data)
    sizes = [batches.size_of(part) for part in parts]
    total = sum(sizes)
    if total == 0:
        raise DataError(f"the evaluation set of task {name!r} is empty")
    for part in parts:
        batches.labels_of(part)
    if subset is None or subset >= total:
        return parts
    if subset < 1:
        raise UsageError(f"subset={subset} must be at least 1, or None for all samples")
    chosen = torch.randperm(total, generator=generator)[:subset].sort().values
    out, begin = [], 0
    for part, size in zip(parts, sizes, strict=True):
        inside = chosen[(chosen >= begin) & (chosen < begin + size)] - begin
        if len(inside):
            out.append(rows(part, inside.to(batches.labels_of(part).device)))
        begin += size
    return out


def _collect(name: str, data: Iterable[Any]) -> list[Any]:
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise DataError(
            f"the evaluation set of task {name!r} is a {type(data).__name__}: give a pair of "
            "tensors (inputs, labels), a dict with 'labels', or an iterable of such batches"
        )
    with random_state_kept():  # a DataLoader draws a seed even when it does not shuffle
        return list(data)


def _join(parts: list[tuple[str, Any]], batch_size: int) -> list[_Piece]:
    """Cut the sets into pieces of at most ``batch_size`` rows, joining those of equal shape."""
    groups: dict[Any, list[tuple[str, Any]]] = {}
    for name, batch in parts:
        groups.setdefault(_shape(batch), []).append((name, batch))
    pieces: list[_Piece] = []
    for group in groups.values():
        joined = _concatenate([batch for _, batch in group])
        owners = [name for name, batch in group for _ in range(batches.size_of(batch))]
        for begin in range(0, len(owners), batch_size):
            inside = owners[begin : begin + batch_size]
            spans = [(n, inside.count(n)) for n in dict.fromkeys(inside)]
            pieces.append((rows(joined, slice(begin, begin + batch_size)), spans))
    return pieces


def _shape(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return (tuple(batch.shape[1:]), batch.dtype, batch.device)
    if isinstance(batch, Mapping):
        return tuple((key, _shape(value)) for key, value in batch.items())
    if isinstance(batch, tuple | list):
        return tuple(_shape(value) for value in batch)
    return repr(batch)


def _concatenate(parts: list[Any]) -> Any:
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {key: _concatenate([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(_concatenate([part[i] for part in parts]) for i in range(len(first)))
    return first
