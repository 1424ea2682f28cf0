"""Low-rank adapters and factors: what they may touch, and how they are kept apart or averaged."""

from __future__ import annotations

from guywire.methods.adapters._hidden import hidden_state_loss
from guywire.methods.adapters.averaging import interpolate_adapters
from guywire.methods.adapters.groups import lora_group, merge_lora_group
from guywire.methods.adapters.i_lora import ILoRA
from guywire.methods.adapters.pego import PEGO, diversify_loss, preserve_loss

__all__ = [
    "PEGO",
    "ILoRA",
    "diversify_loss",
    "hidden_state_loss",
    "interpolate_adapters",
    "lora_group",
    "merge_lora_group",
    "preserve_loss",
]
