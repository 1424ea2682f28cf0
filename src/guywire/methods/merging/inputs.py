"""What the linear layers of a model get as inputs on calibration data.

WANDA wants the norm of each input feature, DAREx-q's rules its mean or some of the inputs
themselves. A few dozen sequences are enough, and labels are not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import batches
from guywire.core.aside import undisturbed
from guywire.core.errors import UsageError
from guywire.core.selection import canonical, unwrap

__all__ = ["LayerInputs", "layer_inputs"]


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of one linear layer over calibration data.

    Attributes:
        mean: of each feature over samples (tokens), ``[in]``.
        square: the mean of its square, ``[in]``.
        count: how many samples.
        rows: some of the inputs, ``[at most rows, in]``.
        transposed: the layer keeps its weight as ``[in, out]``, as GPT-2's do.
    """

    mean: Tensor
    square: Tensor
    count: int
    rows: Tensor
    transposed: bool = False

    @property
    def norms(self) -> Tensor:
        """The Euclidean norm of each feature over all samples, ``[in]``."""
        return (self.square * self.count).sqrt()


def layer_inputs(
    model: nn.Module, data: Iterable[Any], *, rows: int = 512
) -> dict[str, LayerInputs]:
    """Run a model on calibration data and note what its linear layers get.

    The model is left as it was. Tokens that an ``attention_mask`` marks as padding do not count.

    Args:
        model: any module, with ``nn.Linear`` layers or GPT-2's transposed ones.
        data: batches; labels are not used.
        rows: how many inputs of each layer to keep.

    Returns:
        Canonical layer names to their inputs; layers that were not called are left out.

    Raises:
        UsageError: there is no data, or no linear layer was called.

    Example:
        >>> seen = layer_inputs(nn.Sequential(nn.Linear(2, 1)), [(torch.ones(3, 2), None)])
        >>> seen["0"].mean, seen["0"].count
        (tensor([1., 1.]), 3)
    """
    inner = unwrap(model)
    layers = {canonical(n): m for n, m in inner.named_modules() if is_linear(m)}
    noted: dict[str, _Sums] = {name: _Sums(rows) for name in layers}
    present: list[Tensor | None] = [None]
    handles = [
        layer.register_forward_pre_hook(
            lambda _module, args, kwargs, name=name: noted[name].add(
                args[0] if args else kwargs["input"], present[0]
            ),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    device = batches.device_of(inner)
    try:
        with undisturbed(inner, mode=False), torch.no_grad():
            for batch in data:
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                present[0] = None if mask is None else mask.to(device).bool()
                batches.forward(inner, batches.to(batch, device))
    finally:
        for handle in handles:
            handle.remove()
    found = {
        name: sums.result(transposed=not isinstance(layers[name], nn.Linear))
        for name, sums in noted.items()
        if sums.count
    }
    if not found:
        raise UsageError(
            f"none of the model's {len(layers)} linear layers got an input: give at least one batch"
        )
    return found


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer, GPT-2's ``Conv1D`` included.

    Args:
        module: any.

    Returns:
        True if its output is its input times its weight, plus its bias.
    """
    # By name: transformers must not be imported for this.
    kind = type(module)
    return isinstance(module, nn.Linear) or (
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
    )


class _Sums:
    def __init__(self, rows: int) -> None:
        self.most = rows
        self.count = 0
        self.sum: Tensor | None = None
        self.squares: Tensor | None = None
        self.rows: list[Tensor] = []

    def add(self, inputs: Tensor, present: Tensor | None) -> None:
        x = inputs.detach()
        if present is not None and x.shape[:-1] == present.shape:
            x = x[present]
        x = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        if not len(x):
            return
        self.count += len(x)
        total, squares = x.sum(0), x.square().sum(0)
        self.sum = total if self.sum is None else self.sum + total
        self.squares = squares if self.squares is None else self.squares + squares
        if left := self.most - sum(map(len, self.rows)):
            # Evenly over the batch, and several batches, so that no sequence stands for all.
            step = max(1, len(x) // max(1, self.most // 8))
            self.rows.append(x[::step][:left].clone())

    def result(self, *, transposed: bool) -> LayerInputs:
        assert self.sum is not None
        assert self.squares is not None
        return LayerInputs(
            self.sum / self.count,
            self.squares / self.count,
            self.count,
            torch.cat(self.rows),
            transposed,
        )
