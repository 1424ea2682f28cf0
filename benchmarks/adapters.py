"""Two LoRA adapters for the checkpoint that ``merge.make`` writes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.merge import Size, shapes

__all__ = ["make"]

RANK = 16
TARGETS = ("q_proj", "v_proj")


def make(folder: Path, size: Size, rank: int = RANK) -> None:
    """Write ``lora-a`` and ``lora-b``, as PEFT's ``save_pretrained`` would."""
    from peft import LoraConfig

    for number, name in enumerate(("lora-a", "lora-b")):
        g = torch.Generator().manual_seed(number)
        tensors = {}
        for key, shape in shapes(size).items():
            if key.split(".")[-2] not in TARGETS:
                continue
            at = f"base_model.model.{key.removesuffix('.weight')}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(rank, shape[1], generator=g) * 0.02
            tensors[f"{at}.lora_B.weight"] = torch.randn(shape[0], rank, generator=g) * 0.02
        (folder / name).mkdir()
        LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        ).save_pretrained(str(folder / name))
        save_file(tensors, str(folder / name / "adapter_model.safetensors"), {"format": "pt"})
