"""Streams: the tasks of a continual learner, in memory, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from guywire.core.errors import DataError, UsageError
from guywire.lab.streams.config import Scenario

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Batch", "Loader", "Split", "Stream", "Task"]

Batch = tuple[Tensor, Tensor] | dict[str, Tensor]

# Floats that are made at once, at most: 4 MiB.
_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class Split:
    """Samples and their classes.

    Attributes:
        inputs: images, uint8 ``[N, C, H, W]``; or texts, a tuple of strings; or token ids, int32
            ``[N, L]``, padded on the right.
        labels: stream-wide class numbers, int64 ``[N]``.

    Raises:
        DataError: there are more inputs than labels, or fewer.

    Example:
        >>> split = Split(("a", "b", "c"), torch.tensor([0, 1, 0]))
        >>> split.subset(torch.tensor([2, 0])).inputs
        ('c', 'a')
    """

    inputs: Tensor | tuple[str, ...]
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise DataError(f"{len(self.inputs)} inputs do not go with {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | Sequence[int]) -> Split:
        """Return the samples at some indices, copied.

        Args:
            indices: integers, ``[n]``.

        Returns:
            A split of ``n`` samples in the order of the indices.
        """
        at = torch.as_tensor(indices, dtype=torch.int64)
        if isinstance(self.inputs, Tensor):
            return Split(self.inputs[at], self.labels[at])
        return Split(tuple(self.inputs[i] for i in at.tolist()), self.labels[at])

    def concat(self, others: Split | Iterable[Split]) -> Split:
        """Return this split followed by others.

        Args:
            others: one split or several, with inputs of the same kind and shape.

        Returns:
            A new split.

        Raises:
            DataError: the inputs do not go together.
        """
        splits = [self, *([others] if isinstance(others, Split) else others)]
        labels = torch.cat([s.labels for s in splits])
        tensors = [s.inputs for s in splits if isinstance(s.inputs, Tensor)]
        if not tensors:
            return Split(tuple(text for s in splits for text in s.inputs), labels)  # pyright: ignore[reportArgumentType]
        kinds = {(t.dtype, tuple(t.shape[1:])) for t in tensors}
        if len(tensors) < len(splits) or len(kinds) > 1:
            raise DataError("splits of different kinds or shapes of input cannot be joined")
        return Split(torch.cat(tensors), labels)


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a stream.

    Attributes:
        name: for people.
        classes: the stream-wide numbers of its classes.
        train: what to train on.
        valid: what to choose settings by; apart from ``test``.
        test: what to report.
    """

    name: str
    classes: tuple[int, ...]
    train: Split
    valid: Split
    test: Split


@dataclass(frozen=True, eq=False)
class Stream:
    """A sequence of tasks.

    Classes are numbered in the order in which the stream shows them: task 0 has ``0..k-1``. In the
    scenario ``domain`` every task has all of them.

    Attributes:
        name: of the data.
        scenario: ``class``, ``task`` or ``domain``.
        kind: ``image`` or ``text``.
        tasks: in the order of training.
        class_names: by class number.
        mean: mean of each channel, in units of the full range, ``[C]``; ``None`` for texts. It is
            taken from the training data of the *first* task, so that neither test data nor tasks
            to come leak into it.
        std: standard deviation of each channel, likewise.
        pad_id: the token that pads, once texts are tokenised.
        size: side to which images are scaled when a batch is made; ``None`` leaves them.
        channels: number of channels in a batch; grey is repeated, colours are averaged to fit.
        notes: what was left out, and why, in sentences.
        samples: of texts, a few of each task as ``(text, class number)``.
    """

    name: str
    scenario: Scenario
    kind: Literal["image", "text"]
    tasks: tuple[Task, ...]
    class_names: tuple[str, ...]
    mean: Tensor | None = None
    std: Tensor | None = None
    pad_id: int | None = None
    size: int | None = None
    channels: int | None = None
    notes: tuple[str, ...] = ()
    samples: tuple[tuple[tuple[str, int], ...], ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image as it comes in a batch, ``(C, H, W)``.

        Raises:
            UsageError: the stream is of texts.
        """
        inputs = self.tasks[0].train.inputs
        if self.kind != "image" or not isinstance(inputs, Tensor):
            raise UsageError(f"the stream {self.name!r} is of texts and has no shape of an image")
        c, h, w = inputs.shape[1:]
        return self.channels or c, self.size or h, self.size or w

    def batches(
        self, split: Split, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[Batch]:
        """Cut a split into batches.

        Args:
            split: one of this stream's.
            batch_size: samples a batch; the last one may be smaller.
            generator: shuffles the samples; ``None`` keeps their order.

        Yields:
            For images ``(x, labels)``, with ``x`` float32 ``[B, C, H, W]``, normalised; for texts
            a dict with ``input_ids``, ``attention_mask`` and ``labels`` (int64), cut to the longest
            text in the batch.

        Raises:
            UsageError: the batch size is not positive, or texts are not tokenised yet.
        """
        if batch_size < 1:
            raise UsageError(f"a batch size of {batch_size} makes no batches: give 1 or more")
        if not isinstance(split.inputs, Tensor):
            raise UsageError(
                f"the texts of {self.name!r} are not tokenised yet: call "
                "guywire.lab.models.prepare(model_name, stream) first"
            )
        order = None
        if generator is not None:
            where = generator.device
            order = torch.randperm(len(split), generator=generator, device=where).cpu()
        text = self.kind == "text"
        make = self._tokens if text else self._images()
        # Small images are made several batches at a time: for a tiny model the calls cost more than
        # the arithmetic.
        block = batch_size * (1 if text else self._batches_at_once(split.inputs, batch_size))
        for start in range(0, len(split), block):
            if order is None:
                inputs = split.inputs[start : start + block]
                labels = split.labels[start : start + block].clone()
            else:
                at = order[start : start + block]
                inputs, labels = split.inputs[at], split.labels[at]
            made = make(inputs, labels)
            if isinstance(made, tuple):
                yield from zip(*(part.split(batch_size) for part in made), strict=True)
            else:
                yield made

    def loader(self, split: Split, batch_size: int) -> Loader:
        """Return something that gives the batches of a split, unshuffled, as often as it is asked.

        Args:
            split: one of this stream's.
            batch_size: samples a batch.

        Returns:
            An iterable with a length, for ``wires.consolidate`` for instance.
        """
        return Loader(self, split, batch_size)

    def describe(self) -> dict[str, Any]:
        """Return what the stream is, in plain values that go into JSON.

        Returns:
            Names, scenario, notes, and of each task its classes, sizes and, for texts, samples.
        """
        described: dict[str, Any] = {
            "name": self.name,
            "scenario": self.scenario,
            "kind": self.kind,
            "class_names": list(self.class_names),
            "notes": list(self.notes),
            "tasks": [self._describe(i, task) for i, task in enumerate(self.tasks)],
        }
        if self.kind == "image":
            described["shape"] = list(self.shape)
        return described

    def montage(self, task_index: int, count: int = 32) -> Image.Image:
        """Draw training images of a task side by side, its classes taken in turn.

        Args:
            task_index: which task.
            count: how many images at most.

        Returns:
            An RGB picture.

        Raises:
            UsageError: there is no such task, or the stream is of texts.
        """
        from guywire.lab.streams.images import montage

        if not 0 <= task_index < len(self.tasks):
            raise UsageError(f"there is no task {task_index}: the stream has {len(self.tasks)}")
        split = self.tasks[task_index].train
        if self.kind != "image" or not isinstance(split.inputs, Tensor):
            raise UsageError(f"the stream {self.name!r} is of texts, which make no montage")
        return montage(split.inputs[in_turn(split.labels)[:count]])

    def _batches_at_once(self, inputs: Tensor, batch_size: int) -> int:
        side = self.size or max(inputs.shape[-2:])
        floats = batch_size * side * side * max(self.channels or 1, inputs.shape[1])
        return max(1, min(16, _BLOCK // max(1, floats)))

    def _images(self) -> Any:
        assert self.mean is not None
        assert self.std is not None
        # (x / 255 - mean) / std as one multiplication and one addition.
        scale = (1.0 / (255.0 * self.std)).view(1, -1, 1, 1)
        shift = (-self.mean / self.std).view(1, -1, 1, 1)

        def make(inputs: Tensor, labels: Tensor) -> Batch:
            x = inputs.float()
            if self.size is not None and inputs.shape[-2:] != (self.size, self.size):
                shape = (self.size, self.size)
                x = functional.interpolate(x, shape, mode="bilinear", antialias=True)
            if self.channels is not None and x.shape[1] != self.channels:
                # Grey is repeated, colours are averaged.
                x = x.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
            return torch.addcmul(shift, x, scale), labels

        return make

    def _tokens(self, inputs: Tensor, labels: Tensor) -> Batch:
        mask = inputs != self.pad_id
        longest = max(1, int(mask.sum(1).max())) if len(inputs) else 1
        return {
            "input_ids": inputs[:, :longest].long(),
            "attention_mask": mask[:, :longest].long(),
            "labels": labels,
        }

    def _describe(self, index: int, task: Task) -> dict[str, Any]:
        described: dict[str, Any] = {
            "name": task.name,
            "classes": list(task.classes),
            "class_names": [self.class_names[c] for c in task.classes],
            "sizes": {"train": len(task.train), "valid": len(task.valid), "test": len(task.test)},
        }
        if self.samples:
            described["samples"] = [
                {"text": text, "class": self.class_names[label]}
                for text, label in self.samples[index]
            ]
        return described


class Loader:
    """The batches of one split, in order, as often as asked.

    Args:
        stream: makes the batches.
        split: of this stream.
        batch_size: samples a batch.
    """

    def __init__(self, stream: Stream, split: Split, batch_size: int) -> None:
        self.stream = stream
        self.split = split
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self.stream.batches(self.split, self.batch_size)

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)


def in_turn(labels: Tensor) -> Tensor:
    """Order samples so that classes take turns: the first of each, then the second of each.

    Args:
        labels: int64 ``[N]``.

    Returns:
        A permutation, int64 ``[N]``.

    Example:
        >>> in_turn(torch.tensor([5, 5, 5, 2]))
        tensor([3, 0, 1, 2])
    """
    order = torch.argsort(labels, stable=True)
    ranked = labels[order]
    rank = torch.arange(len(labels)) - torch.searchsorted(ranked, ranked)
    return order[torch.argsort(rank, stable=True)]
