"""Read a PEFT LoRA adapter as the change that it makes to its base.

A layer's change is ``scaling * B A`` with ``scaling = alpha / r`` (``alpha / sqrt(r)`` for rsLoRA),
transposed where the layer keeps its weight as ``[in, out]``. The factors stay in memory, the products
are made for the rows that are asked for. What the adapter saves whole (``modules_to_save``, biases) is
read like any fine-tuned tensor.

Adapters whose merged weight is something else (DoRA and others) are refused.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guywire.core.errors import CheckpointError, DataError
from guywire.methods.merging.files import Checkpoint, Entry, read_json

__all__ = ["Adapter", "Factors", "is_adapter"]

_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")
# What changes the merged weight into more than W + scaling * B A, and how to say it.
_OTHER = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "LoRA with a bias of its own",
    "alora_invocation_tokens": "activated LoRA, which acts on some tokens only",
    "arrow_config": "an Arrow router",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron layers",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "single trained tokens",
}
_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """The LoRA of one weight.

    Attributes:
        a: ``[r, in]``, float32.
        b: ``[out, r]``, float32.
        scaling: of the product.
        transposed: the weight is ``[in, out]``.
    """

    a: Tensor
    b: Tensor
    scaling: float
    transposed: bool

    @property
    def numel(self) -> int:
        """Number of weights that change."""
        return self.b.shape[0] * self.a.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Return a slice of the flattened change.

        Args:
            start: first weight.
            stop: after the last one.

        Returns:
            float32, ``[stop - start]``.
        """
        left, right = (self.a.T, self.b.T) if self.transposed else (self.b, self.a)
        width = right.shape[1]
        first = start // width
        last = -(-stop // width)
        dense = (left[first:last] @ right).mul_(self.scaling).reshape(-1)
        return dense[start - first * width : stop - first * width]


class Adapter:
    """A folder that PEFT's ``save_pretrained`` wrote.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Attributes:
        factors: names of weights, as in the model that was adapted, to their LoRA.
        whole: such names to the adapter's own tensors that replace them.
        checkpoint: the adapter's file.
        base: what the adapter says that it was trained on, if it does.

    Raises:
        DataError: it is no LoRA, or of a kind that is more than ``W + scaling * B A``.
        CheckpointError: it is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        config = read_json(self.path / _CONFIG)
        _refuse(config, self.path)
        if not (self.path / "adapter_model.safetensors").is_file():
            raise DataError(
                f"{self.path} has no adapter_model.safetensors: save the adapter again with a "
                "current PEFT (pickled adapters are never read)"
            )
        self.checkpoint = Checkpoint(self.path / "adapter_model.safetensors")
        self.base = config.get("base_model_name_or_path")
        self.factors: dict[str, Factors] = {}
        self.whole: dict[str, Entry] = {}
        halves: dict[tuple[str, bool], dict[str, str]] = {}
        for name, entry in self.checkpoint.tensors.items():
            short = name.removeprefix(_PREFIX)
            if found := _FACTOR.match(short):
                halves.setdefault((found[1], bool(found[2])), {})[found[3]] = name
            elif "lora_" in short or short == name:
                raise DataError(
                    f"{self.path} holds {name!r}, which is no part of a plain LoRA: merge the adapter "
                    "with PEFT's merge_and_unload, save, and give that folder"
                )
            else:
                self.whole[short.replace(".base_layer.", ".")] = entry
        for (module, embedding), pair in halves.items():
            self.factors[f"{module}.weight"] = self._product(module, embedding, pair, config)

    def _product(
        self, module: str, embedding: bool, pair: dict[str, str], config: dict[str, Any]
    ) -> Factors:
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{self.checkpoint.path} has only one factor for {module!r}")
        a, b = (self._flat(pair[half]) for half in "AB")
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise CheckpointError(
                f"the factors of {module!r} in {self.checkpoint.path} have the shapes "
                f"{tuple(a.shape)} and {tuple(b.shape)}: they do not belong together"
            )
        try:
            alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise CheckpointError(
                f"{self.path / _CONFIG} gives no lora_alpha that is a number for {module!r}"
            ) from error
        rank = a.shape[0]
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        # An embedding's factors are those of its transpose.
        return Factors(a, b, scaling, embedding or bool(config.get("fan_in_fan_out")))

    def _flat(self, name: str) -> Tensor:
        entry = self.checkpoint.tensors[name]
        value = self.checkpoint.read(name).to(torch.float32)
        return value.reshape(entry.shape[0], -1) if len(entry.shape) >= 2 else value


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Tell whether a folder is a PEFT adapter.

    Args:
        path: of the folder.

    Returns:
        True if it has an ``adapter_config.json``.
    """
    return os.path.isfile(Path(path) / _CONFIG)


def _refuse(config: dict[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    remedy = "merge it with PEFT's merge_and_unload, save, and give that folder"
    if kind != "LORA":
        raise DataError(f"{path} is a PEFT adapter of the kind {kind!r}, not LORA: {remedy}")
    for key, says in _OTHER.items():
        if config.get(key):
            raise DataError(f"{path} uses {says} ({key}), which is more than B A: {remedy}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_INITS):
        raise DataError(
            f"{path} was started with {start!r}, which changed the base's weights, too: convert it "
            "with path_initial_model_for_weight_conversion of PEFT's save_pretrained"
        )


def _pattern(table: Any, module: str, default: Any) -> float:
    for key, value in (table or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return float(default)
