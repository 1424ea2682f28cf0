"""Take batches apart: the one place that knows what a batch looks like.

A batch is a pair ``(inputs, labels)`` or a Hugging Face dict (or ``BatchEncoding``) with the key
``labels``. Inputs of a pair are a tensor, or a tuple of tensors passed as positional arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core.errors import DataError

__all__ = [
    "Batch",
    "device_of",
    "forward",
    "is_causal",
    "labels_of",
    "logits_of",
    "size_of",
    "to",
]

Batch = Any


def labels_of(batch: Batch) -> Tensor:
    """Return the labels of a batch.

    Args:
        batch: a pair ``(inputs, labels)`` or a dict with ``labels``.

    Returns:
        The labels as they came.

    Raises:
        DataError: the batch has no labels.

    Example:
        >>> labels_of((torch.zeros(2, 3), torch.tensor([0, 1])))
        tensor([0, 1])
    """
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise DataError(f"a batch with the keys {sorted(batch)} has no 'labels'")
        return batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[1]
    raise DataError(
        f"a batch must be a pair (inputs, labels) or a dict with 'labels', not {_describe(batch)}"
    )


def forward(model: nn.Module, batch: Batch) -> Any:
    """Run the model on the inputs of a batch.

    Labels are passed on only to encoder-decoder models, which make the decoder's input of them.

    Args:
        model: any module.
        batch: a pair ``(inputs, labels)`` or a dict of keyword arguments.

    Returns:
        Whatever the model returns.

    Raises:
        DataError: the batch is neither.
    """
    if isinstance(batch, Mapping):
        keep = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return model(**{k: v for k, v in batch.items() if keep or k != "labels"})
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs = batch[0]
        return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    raise DataError(
        f"a batch must be a pair (inputs, labels) or a dict with 'labels', not {_describe(batch)}"
    )


def logits_of(outputs: Any) -> Tensor:
    """Return the logits in a model's output: a tensor, ``.logits``, ``["logits"]`` or a tuple's first.

    Args:
        outputs: what the model returned.

    Returns:
        The logits, of shape ``[batch, ..., classes]``.

    Raises:
        DataError: there are none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    found = getattr(outputs, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise DataError(f"no logits in the model's output, {_describe(outputs)}")


def size_of(batch: Batch) -> int:
    """Return how many samples (sequences, for text) a batch holds.

    Args:
        batch: a pair or a dict.

    Returns:
        The length of the first dimension of its first tensor.

    Raises:
        DataError: it holds no tensor.
    """
    values = batch.values() if isinstance(batch, Mapping) else batch
    for value in values:
        if isinstance(value, Tensor):
            return value.shape[0]
        if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
            return value[0].shape[0]
    raise DataError(f"no tensor in a batch, {_describe(batch)}")


def to(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device.

    Args:
        batch: tensors, or tuples, lists and dicts of them; anything else stays as it is.
        device: where to.

    Returns:
        The same structure with moved tensors.
    """
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to(value, device) for value in batch)
    return batch


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter (the CPU if it has none).

    Args:
        model: any module.

    Returns:
        The device.
    """
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def is_causal(model: nn.Module) -> bool:
    """Say whether a model's logits at a position predict the next one: a Hugging Face causal LM.

    Args:
        model: the unwrapped model; of PEFT's wrapper the model inside counts.

    Returns:
        True for classes named ``*ForCausalLM`` or ``*LMHeadModel`` that are no encoder-decoder.
    """
    inside = getattr(model, "get_base_model", None)
    model = inside() if callable(inside) else model  # pyright: ignore[reportAssignmentType]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return any(c.__name__.endswith(("ForCausalLM", "LMHeadModel")) for c in type(model).__mro__)


def _describe(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
