"""What -log p(y|x) is, and the gradients of it with respect to the logits.

With p = softmax(z), the gradient of -log p(y|x) at the logits is p - onehot(y) at every target
position, and zero where a target is ignored (-100) or lies in padding. A *signal* is such a gradient
for a whole batch; one backward pass from a signal gives every sample's gradient at once, because the
samples do not see each other.

- ``true`` / ``sampled`` labels of whole samples: one signal.
- unit ``token``: the gradient of one token's -log p alone, so one signal per position.
- ``expected``: E_y (sum_t s_t)(sum_t s_t)^T over y ~ p(y|x). Given the inputs (for a language model
  the given prefix, teacher forcing) the tokens are independent and every score has mean zero, so the
  cross terms vanish: the expectation for a sequence is the sum over its tokens of
  sum_c p_c (grad -log p_c)^2. With the weight inside the square that is one signal
  sqrt(p_c) (p - e_c) per position and class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from guywire.core import batches
from guywire.core.batches import is_causal
from guywire.core.errors import DataError, UsageError

__all__ = ["IGNORED", "MAX_CLASSES", "MAX_PASSES", "Targets", "is_causal", "labels_or_none"]

IGNORED = -100
MAX_CLASSES = 1000
MAX_PASSES = 10_000


def labels_or_none(batch: Any, kind: str) -> Tensor | None:
    """Return a batch's labels, checked; ``None`` where there are none and none are needed.

    Args:
        batch: a pair or a dict.
        kind: ``true``, ``expected`` or ``sampled``.

    Returns:
        Whole-number labels.

    Raises:
        DataError: labels are missing though needed, or are no whole numbers.
    """
    if kind != "true" and isinstance(batch, Mapping) and batch.get("labels") is None:
        return None
    labels = batches.labels_of(batch)
    if not isinstance(labels, Tensor):
        labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(
            f"labels of type {labels.dtype}: the Fisher information here is that of softmax "
            "classifiers and language models, whose labels are whole numbers; regression and "
            "sigmoid outputs are out of scope"
        )
    return labels


class Targets:
    """The target positions of one batch.

    Args:
        logits: from the model, ``[B, C]``, ``[B, T, V]``, or with the classes in dimension 1 where
            the labels say so.
        labels: ``[B]``, ``[B, T]``, ...; ``None`` for every position.
        mask: ``[B, T]``, zero at padding; ``None`` if nothing is padded.
        causal: the logits at t belong to the label at t + 1.

    Raises:
        DataError: shapes do not fit, a label is outside the head, or the head has one output.
    """

    def __init__(
        self, logits: Tensor, labels: Tensor | None, mask: Tensor | None, *, causal: bool
    ) -> None:
        if not logits.is_floating_point() or logits.dim() < 2:
            raise DataError(
                f"logits of shape {tuple(logits.shape)} and type {logits.dtype}: expected "
                "[batch, classes] or [batch, positions, classes]"
            )
        self.class_dim = _class_dim(logits, labels)
        self.classes = logits.shape[self.class_dim]
        if self.classes < 2:
            raise DataError(
                "the model has a single output: a softmax over it says nothing, and sigmoid and "
                "regression outputs are out of scope; use a head of two classes"
            )
        z = logits.detach().movedim(self.class_dim, -1)
        self._shape = z.shape
        self.z = z.reshape(z.shape[0], -1, self.classes)
        self.y = _positions(z, labels, mask, causal).reshape(z.shape[0], -1)
        self.valid = self.y != IGNORED
        _check_range(self.y[self.valid], self.classes, has_labels=labels is not None)

    def count(self, unit: str) -> int:
        """Return how many units with a target the batch holds.

        Args:
            unit: ``sample`` or ``token``.

        Returns:
            Tokens with a target, or samples with at least one.
        """
        return int((self.valid if unit == "token" else self.valid.any(1)).sum())

    def passes(self, kind: str, unit: str) -> int:
        """Return how many backward passes the batch needs.

        Args:
            kind: ``true``, ``expected`` or ``sampled``.
            unit: ``sample`` or ``token``.

        Returns:
            The number of signals.

        Raises:
            UsageError: it is unreasonable.
        """
        positions = int(self.valid.any(0).sum())
        if kind != "expected":
            return min(positions, 1) if unit == "sample" else positions
        passes = positions * self.classes
        if self.classes > MAX_CLASSES or passes > MAX_PASSES:
            raise UsageError(
                f"labels='expected' over {self.classes} classes at {positions} positions takes "
                f"{passes} backward passes a batch (at most {MAX_CLASSES} classes and {MAX_PASSES} "
                "passes): use labels='sampled'"
            )
        return passes

    def signals(self, kind: str, unit: str, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield gradients at the logits, one for each backward pass.

        Args:
            kind: ``true``, ``expected`` or ``sampled``.
            unit: ``sample`` or ``token``.
            generator: for ``sampled``.

        Yields:
            Tensors of the logits' shape and type.
        """
        dtype = torch.promote_types(self.z.dtype, torch.float32)
        p = self.z.softmax(-1, dtype=dtype)
        columns = self.valid.any(0).nonzero()[:, 0].tolist()
        if kind == "expected":
            for t in columns:
                for c in range(self.classes):
                    part = p[:, t].clone()
                    part[:, c] -= 1
                    part *= (p[:, t, c].sqrt() * self.valid[:, t])[:, None]
                    yield self._at(part, t)
            return
        y = self._sample(p, generator) if kind == "sampled" else self.y
        p.masked_fill_(~self.valid[..., None], 0.0)
        p.scatter_add_(-1, y.clamp(min=0)[..., None], -self.valid[..., None].to(dtype))
        if unit == "token" and p.shape[1] > 1:
            for t in columns:
                yield self._at(p[:, t], t)
        elif columns:
            yield self._like_logits(p)

    def zero(self) -> Tensor:
        """Return a signal that says nothing.

        Returns:
            Zeros of the logits' shape.
        """
        return self._like_logits(torch.zeros_like(self.z))

    def _sample(self, p: Tensor, generator: torch.Generator) -> Tensor:
        # By the inverse of the distribution function, one number for each target in the order of
        # the data: neither batch size nor padding changes what is drawn.
        rows = p[self.valid].double()
        u = torch.rand(len(rows), generator=generator, device=generator.device, dtype=torch.float64)
        cdf = rows.cumsum(-1)
        u = u.to(rows.device) * cdf[:, -1]
        y = self.y.clone()
        drawn = torch.searchsorted(cdf, u[:, None], right=True)[:, 0]
        y[self.valid] = drawn.clamp(max=self.classes - 1)
        return y

    def _at(self, part: Tensor, position: int) -> Tensor:
        signal = part.new_zeros(self.z.shape)
        signal[:, position] = part
        return self._like_logits(signal)

    def _like_logits(self, signal: Tensor) -> Tensor:
        return signal.view(self._shape).movedim(-1, self.class_dim).to(self.z.dtype)


def _class_dim(logits: Tensor, labels: Tensor | None) -> int:
    if labels is None or labels.shape == logits.shape[:-1]:
        return logits.dim() - 1
    if labels.shape == (logits.shape[0], *logits.shape[2:]):
        return 1
    raise DataError(
        f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}: "
        "expected one whole number for each position"
    )


def _positions(z: Tensor, labels: Tensor | None, mask: Tensor | None, causal: bool) -> Tensor:
    lead = z.shape[:-1]
    if labels is None:
        y = torch.zeros(lead, dtype=torch.long, device=z.device)
    else:
        y = labels.to(z.device, torch.long)
    if mask is not None and mask.shape != lead:
        mask = None
    real = None if mask is None else mask.to(z.device) != 0
    if causal and len(lead) == 2:
        # Position t predicts label t + 1; both must be real, or the first token after padding on
        # the left would count with nothing to be predicted from.
        y = torch.cat([y[:, 1:], torch.full_like(y[:, :1], IGNORED)], 1)
        if real is not None:
            real = torch.cat([real[:, 1:] & real[:, :-1], torch.zeros_like(real[:, :1])], 1)
    return y if real is None else y.masked_fill(~real, IGNORED)


def _check_range(y: Tensor, classes: int, *, has_labels: bool) -> None:
    if not has_labels or y.numel() == 0:
        return
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"label {low if low < 0 else high} is outside the head of {classes} classes: labels run "
            f"from 0 to {classes - 1}, and {IGNORED} marks a target to ignore"
        )
