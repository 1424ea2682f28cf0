"""The exact diagonal of the Fisher information: the mean of squared *per-sample* gradients.

    F_i = 1/N sum_n (d/dtheta_i -log p(y_n | x_n; theta))^2

with y_n the true labels (the empirical Fisher), labels drawn from the model, or the expectation over
the model's own distribution. Squaring the gradient of a batch's mean loss instead is a known error:
it shrinks with the batch size, and depends on it.

One forward and one backward pass serve a whole batch. Every layer's weight gradient of one sample is
a sum over positions of products of its input and its output's gradient, so the squares come from
these, without a plain weight gradient ever being computed; see ``_pieces`` for the arithmetic and
``_layers`` for the layers. Everything else falls back to ``torch.func`` on the layer alone, or where
even that cannot be (a parameter that belongs to no layer, samples that cannot be told apart) to one
sample at a time; the log says so.

Source: the diagonal Fisher of Kirkpatrick et al., arXiv 1612.00796; the product form of per-sample
gradients in Goodfellow, arXiv 1510.01799; true against empirical Fisher in Kunstner et al., arXiv
1905.12558.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from guywire.core.selection import Selection
from guywire.core.selection import select as select_parameters
from guywire.core.tensors import Tensors
from guywire.curvature._estimate import estimate

__all__ = ["diagonal_fisher"]


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    labels: Literal["expected", "sampled", "true"] = "expected",
    unit: Literal["sample", "token"] = "sample",
    select: Selection = None,
    generator: torch.Generator | None = None,
) -> Tensors:
    """Return the exact diagonal Fisher information of a softmax classifier or language model.

    The model runs in eval mode. Its training flags, ``requires_grad`` flags, gradients, BatchNorm
    buffers and the global random state are left as they were. The result does not depend on how
    samples are put into batches.

    Targets labelled -100, and those at padding (``attention_mask`` 0), never count. A sample of
    which no target is left says nothing and is not counted, neither above nor below the fraction.
    For Hugging Face causal language models labels are shifted by one, as in their own loss.

    Under DDP and FSDP2 each process passes its own part of the data and all get the result for the
    whole; under FSDP2 as DTensors sharded like the parameters. (FSDP2: where whole sums of all
    selected parameters take more than 256 MiB, each block's are handed to the owners of the shards
    during the backward pass, so a process holds its shards and the whole sums of a block or two.)

    Args:
        model: gives logits ``[B, C]`` or ``[B, T, V]`` (or ``[B, C, ...]`` with labels
            ``[B, ...]``); plain, compiled, or wrapped by DDP or FSDP2.
        batches: pairs ``(inputs, labels)`` or Hugging Face dicts.
        labels: ``"expected"`` over the model's own distribution, exact, with one backward pass a
            class (and position); ``"sampled"``, one draw from it; ``"true"``, the given labels.
            Dicts may come without labels unless they are ``"true"``.
        unit: what is squared: the gradient of a whole ``"sample"`` (a sequence: the sum over its
            tokens), or of each ``"token"``, which takes one backward pass a position.
        select: which parameters, see :func:`guywire.select`; others cost nothing.
        generator: for ``"sampled"``; a new one with seed 0 if ``None``.

    Returns:
        Canonical names to tensors of the parameters' shapes, float32 (float64 for float64
        parameters). Zeros for parameters that the outputs do not depend on.

    Raises:
        SelectionError: the selection matches nothing.
        UsageError: an argument has no such value, ``"expected"`` would take too many passes, or a
            layer mixes samples.
        DataError: no data, no target in it, a label outside the head, or labels that are no whole
            numbers (regression and sigmoid outputs are out of scope).

    Example:
        With one position a sample, the weight of a linear layer has ``F = mean (p - y)^2 x^2``:

        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([0])
        >>> diagonal_fisher(model, [(x, y)], labels="true")
        {'weight': tensor([[0.2500, 1.0000],
                [0.2500, 1.0000]])}
    """
    return estimate(
        model,
        batches,
        lambda inner: select_parameters(inner, select),
        labels=labels,
        unit=unit,
        generator=generator,
    )
