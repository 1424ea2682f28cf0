"""A backbone and a head that grows with the classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core.errors import UsageError

__all__ = ["Classifier", "GrowingHead"]


class GrowingHead(nn.Module):
    """A linear layer that gets new rows as parameters of their own, one block a task.

    Old rows stay the same tensors, so a penalty holds them and leaves new rows free.

    Args:
        width: number of features.

    Example:
        >>> head = GrowingHead(3)
        >>> head.grow(2, torch.Generator().manual_seed(0))
        >>> head.grow(1, torch.Generator().manual_seed(1))
        >>> head(torch.zeros(4, 3)).shape, [name for name, _ in head.named_parameters()][:2]
        (torch.Size([4, 3]), ['blocks.0.weight', 'blocks.0.bias'])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList()

    @property
    def classes(self) -> int:
        """Number of classes so far."""
        return sum(int(block.out_features) for block in self.blocks)  # pyright: ignore[reportArgumentType]

    def grow(
        self,
        n_classes: int,
        generator: torch.Generator,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add a block of classes.

        Args:
            n_classes: how many.
            generator: of the CPU; draws the weights, uniform within ``1 / sqrt(width)``; biases are zero.
            device: of the block; that of the last block if ``None``.
            dtype: of the block; likewise.

        Raises:
            UsageError: the number is not positive.
        """
        if n_classes < 1:
            raise UsageError(f"a head cannot grow by {n_classes} classes: give 1 or more")
        if len(self.blocks):
            last = next(self.blocks[-1].parameters())
            device, dtype = device or last.device, dtype or last.dtype
        block: nn.Linear = nn.utils.skip_init(nn.Linear, self.width, n_classes, device="cpu")  # pyright: ignore[reportAssignmentType]
        bound = 1.0 / math.sqrt(self.width)
        with torch.no_grad():
            block.weight.uniform_(-bound, bound, generator=generator)
            block.bias.zero_()
        self.blocks.append(block.to(device=device, dtype=dtype).train(self.training))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits over all classes so far.

        Args:
            features: ``[B, width]``.

        Returns:
            ``[B, classes]``.

        Raises:
            UsageError: the head has not grown yet.
        """
        if not len(self.blocks):
            raise UsageError("the head has no classes yet: call model.grow(n_classes, generator)")
        return torch.cat([block(features) for block in self.blocks], dim=-1)


class Classifier(nn.Module):
    """A backbone that makes features, and a growing head on top.

    Args:
        backbone: maps inputs (or ``input_ids`` and ``attention_mask``) to features ``[B, width]``.
        width: number of features.
        name: of the model, for people.
    """

    def __init__(self, backbone: nn.Module, width: int, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.backbone = backbone
        self.head = GrowingHead(width)

    @property
    def classes(self) -> int:
        """Number of classes so far."""
        return self.head.classes

    def grow(self, n_classes: int, generator: torch.Generator) -> None:
        """Add a block of classes to the head, where the backbone lives.

        Args:
            n_classes: how many.
            generator: draws the weights.

        Raises:
            UsageError: the number is not positive.
        """
        first = next(self.backbone.parameters(), None)
        where = {} if first is None else {"device": first.device, "dtype": first.dtype}
        self.head.grow(n_classes, generator, **where)

    def features(self, *inputs: Tensor, **tokens: Any) -> Tensor:
        """Return what the backbone makes of a batch.

        Args:
            *inputs: images ``[B, C, H, W]``; or
            **tokens: ``input_ids`` and ``attention_mask``; ``labels`` is passed over.

        Returns:
            Features, ``[B, width]``.
        """
        tokens.pop("labels", None)
        return self.backbone(*inputs, **tokens)

    def forward(self, *inputs: Tensor, **tokens: Any) -> Tensor:
        """Return logits over all classes so far.

        Args:
            *inputs: as in :meth:`features`.
            **tokens: as in :meth:`features`.

        Returns:
            ``[B, classes]``.

        Raises:
            UsageError: the head has not grown yet.
        """
        return self.head(self.features(*inputs, **tokens))
