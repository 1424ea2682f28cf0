"""Where a model has LoRA factors: one view of PEFT's layers, whatever put them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from guywire.core.errors import SelectionError, need
from guywire.core.selection import canonical

__all__ = ["Site", "sites"]


@dataclass(frozen=True)
class Site:
    """One adapter of one layer: ``update = scaling * B @ A``.

    Attributes:
        name: canonical name of the adapted layer.
        adapter: PEFT's name of the adapter.
        layer: PEFT's LoRA layer.
        A: ``[r, in]``, trainable.
        B: ``[out, r]``, trainable, zero at first.
        scaling: alpha / r.
    """

    name: str
    adapter: str
    layer: nn.Module
    A: nn.Parameter
    B: nn.Parameter
    scaling: float

    @property
    def base(self) -> Tensor:
        """The frozen weight ``[out, in]``, without a graph."""
        weight = self.layer.get_base_layer().weight.detach()  # type: ignore[operator]
        return weight.T if getattr(self.layer, "fan_in_fan_out", False) else weight

    def update(self) -> Tensor:
        """Return the update ``[out, in]``, with a graph to A and B."""
        return self.scaling * (self.B @ self.A)


def sites(model: nn.Module, adapters: Sequence[str] | None = None) -> list[Site]:
    """Return every pair of LoRA factors of linear layers.

    Works on what ``peft.get_peft_model`` returns and on a model that
    ``peft.inject_adapter_in_model`` changed in place.

    Args:
        model: the model.
        adapters: names of the adapters; all of them if ``None``.

    Returns:
        The sites, layer by layer, in the order of ``model.named_modules()`` and within a layer of
        the adapters.

    Raises:
        SelectionError: the model has no such adapter, or one that is no plain LoRA of a linear
            layer.
    """
    need("peft", extra="adapters")
    from peft.tuners.lora import LoraLayer

    found: list[Site] = []
    seen: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in [*module.lora_A, *module.lora_embedding_A]:
            seen.add(adapter)
            if adapters is not None and adapter not in adapters:
                continue
            pair = [side[adapter] for side in (module.lora_A, module.lora_B) if adapter in side]
            if len(pair) < 2 or not all(isinstance(factor, nn.Linear) for factor in pair):
                kind = type(module.get_base_layer()).__name__
                raise SelectionError(
                    f"the adapter {adapter!r} of {name!r} adapts a {kind}: only LoRA of linear "
                    "layers is supported, take it out of target_modules"
                )
            down, up = pair
            found.append(
                Site(
                    canonical(name),
                    adapter,
                    module,  # type: ignore[arg-type]
                    down.weight,  # type: ignore[arg-type]
                    up.weight,  # type: ignore[arg-type]
                    float(module.scaling[adapter]),
                )
            )
    if adapters is None and not found:
        raise SelectionError(
            "the model has no LoRA layers: use peft.get_peft_model(model, LoraConfig(...)) first"
        )
    if adapters is not None and (missing := set(adapters) - seen):
        raise SelectionError(
            f"the model has no adapter {min(missing)!r}: it has {', '.join(sorted(seen)) or 'none'}"
        )
    return found
