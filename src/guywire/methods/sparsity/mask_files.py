"""Masks on disk, one bit a weight, and how many weights are off."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from guywire.core import checkpoint
from guywire.core.errors import CheckpointError
from guywire.core.selection import named_parameters
from guywire.methods.sparsity.masks import masks_of

__all__ = [
    "MaskReport",
    "apply_mask",
    "load_mask",
    "mask_report",
    "pack_bits",
    "save_mask",
    "unpack_bits",
]

_KIND = "guywire-mask-1"


def pack_bits(on: Tensor) -> Tensor:
    """Return a mask as bits, eight a byte, the first weight in the highest bit.

    Args:
        on: boolean, of any shape, with n entries.

    Returns:
        ``[ceil(n / 8)]``, uint8, on the CPU.

    Example:
        >>> pack_bits(torch.tensor([True, False, False, False, False, False, False, True, True]))
        tensor([129, 128], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(on.detach().cpu().bool().reshape(-1).numpy()))


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the mask that :func:`pack_bits` packed.

    Args:
        packed: ``[ceil(n / 8)]``, uint8.
        shape: of the mask, with n entries.

    Returns:
        A boolean tensor of that shape.

    Raises:
        CheckpointError: the number of bytes does not fit the shape.

    Example:
        >>> unpack_bits(torch.tensor([160], dtype=torch.uint8), (3,))
        tensor([ True, False,  True])
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // 8):
        raise CheckpointError(
            f"{packed.numel()} values of type {packed.dtype} are no mask of shape {shape}: "
            f"that takes {-(-count // 8)} bytes"
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=count)
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def save_mask(path: str | os.PathLike[str], masks: nn.Module | Mapping[str, Tensor]) -> None:
    """Write masks to a safetensors file, one bit a weight.

    Args:
        path: the file.
        masks: a masked model, or names of weights to boolean tensors.

    Raises:
        CheckpointError: the file cannot be written.
        SelectionError: the model has no masks.
    """
    found = masks_of(masks) if isinstance(masks, nn.Module) else dict(masks)
    checkpoint.save(
        path,
        {
            "kind": _KIND,
            "masks": {name: pack_bits(on) for name, on in found.items()},
            "shapes": {name: list(on.shape) for name, on in found.items()},
        },
    )


def load_mask(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read masks that :func:`save_mask` wrote.

    Args:
        path: the file.

    Returns:
        Names of weights to boolean tensors; for :func:`apply_mask`.

    Raises:
        CheckpointError: the file is damaged, or holds no masks.
    """
    tree = checkpoint.load(path)
    if not isinstance(tree, dict) or tree.get("kind") != _KIND:
        raise CheckpointError(f"{path} holds no masks: give a file that save_mask() wrote")
    try:
        return {
            name: unpack_bits(packed, tuple(tree["shapes"][name]))
            for name, packed in tree["masks"].items()
        }
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"the masks in {path} make no sense: write them again with save_mask()"
        ) from error


def apply_mask(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Set to zero, in a plain model, the weights that are off: what training and folding gave.

    Args:
        model: the original model, without masks; changed in place.
        masks: names of weights to boolean tensors.

    Returns:
        The model.

    Raises:
        CheckpointError: a name or a shape is not the model's.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = apply_mask(model, {"weight": torch.tensor([[True, False]])})
        >>> bool(model.weight[0, 1] == 0.0)
        True
    """
    weights = named_parameters(model)
    for name, on in masks.items():
        if name not in weights:
            raise CheckpointError(
                f"the model has no weight {name!r} for its mask: build the model that was masked, "
                "and fold or unmask it if it is masked now"
            )
        if weights[name].shape != on.shape:
            raise CheckpointError(
                f"the mask of {name!r} has the shape {tuple(on.shape)}, the weight "
                f"{tuple(weights[name].shape)}"
            )
    with torch.no_grad():
        for name, on in masks.items():
            weights[name].masked_fill_(~on.to(weights[name].device), 0.0)
    return model


@dataclass(frozen=True)
class MaskReport:
    """How many weights are off.

    Attributes:
        off: names of weights to the number that is off.
        total: names of weights to their number.
    """

    off: dict[str, int]
    total: dict[str, int]

    @property
    def share(self) -> float:
        """The share of all masked tensors' weights that is off."""
        return sum(self.off.values()) / max(1, sum(self.total.values()))

    @property
    def bytes(self) -> int:
        """What the bits take on disk."""
        return sum(-(-count // 8) for count in self.total.values())

    def __str__(self) -> str:
        width = max([len(name) for name in self.total], default=0)
        lines = [
            f"{name:<{width}}  {100 * self.off[name] / max(1, count):6.2f} % of {count:,}"
            for name, count in self.total.items()
        ]
        every = sum(self.total.values())
        return "\n".join(
            [*lines, f"off: {100 * self.share:.2f} % of {every:,} weights, {self.bytes:,} bytes"]
        )


def mask_report(model: nn.Module) -> MaskReport:
    """Count the weights that are off.

    Args:
        model: a masked model.

    Returns:
        The report; ``print`` it.

    Raises:
        SelectionError: the model has no masks.

    Example:
        >>> import guywire as gw
        >>> model = nn.Linear(4, 2)
        >>> with torch.no_grad():
        ...     _ = gw.mask(model, "weight")["weight"][0, 0].zero_()
        >>> print(mask_report(model))
        weight   12.50 % of 8
        off: 12.50 % of 8 weights, 1 bytes
    """
    found = masks_of(model)
    return MaskReport(
        {name: int((~on).sum()) for name, on in found.items()},
        {name: on.numel() for name, on in found.items()},
    )
