"""The pretrained sentence encoder, cut in two: a frozen front that runs once, and a back that learns.

The front (embeddings and the first layers of MiniLM) never moves and has no dropout, so what comes out
of it for a text is the same at every step: one unit writes it down for all others. The back, the last
layers with LoRA on queries and values, is all that is trained, with one head for all answers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import checkpoint
from guywire.core.errors import need
from guywire.lab.models import huggingface
from guywire.lab.models.seeding import seeded
from guywire.lab.studies.i_lora.texts import PARTS, TASKS, Item

__all__ = ["Back", "Encoded", "Part", "encode", "read", "write"]


@dataclass(frozen=True)
class Part:
    """Texts of one task and one part, as the front sees them.

    Attributes:
        hidden: ``[N, L, width]``.
        mask: ``[N, L]``, 1 for tokens.
        labels: ``[N]``, numbers of answers over all tasks.
    """

    hidden: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """Return some texts as a batch, cut to the longest of them.

        Args:
            index: ``[n]``.

        Returns:
            ``hidden``, ``attention_mask`` and ``labels``.
        """
        mask = self.mask[index]
        longest = int(mask.sum(1).max())
        return {
            "hidden": self.hidden[index, :longest],
            "attention_mask": mask[:, :longest],
            "labels": self.labels[index],
        }

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Return all texts in batches, those of about the same length together.

        Args:
            size: of a batch.

        Returns:
            The batches.
        """
        order = self.mask.sum(1).argsort(stable=True)
        return [self.rows(index) for index in order.split(size)]


@dataclass(frozen=True)
class Encoded:
    """All texts of the study.

    Attributes:
        parts: task, then part, to its texts.
        answers: by number.
    """

    parts: dict[str, dict[str, Part]]
    answers: list[str]


class Back(nn.Module):
    """The last layers of the encoder, the mean over tokens, and a head.

    Args:
        layers: copied; frozen.
        width: of the hidden states.
        answers: rows of the head.
        rank: of the LoRA factors.
        generator: draws factors and head.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        width: int,
        answers: int,
        rank: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        peft = need("peft", extra="adapters")
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
        self.requires_grad_(False)
        with seeded(generator):
            config = peft.LoraConfig(
                r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=["query", "value"]
            )
            peft.inject_adapter_in_model(config, self)
            self.head = nn.Linear(width, answers)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits.

        Args:
            hidden: ``[B, L, width]``, from the front.
            attention_mask: ``[B, L]``.

        Returns:
            ``[B, answers]``.
        """
        weight = attention_mask.unsqueeze(-1).to(hidden)
        seen = attention_mask[:, None, None, :].to(torch.bool)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=seen)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


def encode(items: Sequence[Item], *, front: int, longest: int) -> dict[str, Any]:
    """Run the front over all texts.

    Args:
        items: the texts.
        front: how many layers it has.
        longest: tokens of a text, at most.

    Returns:
        A tree for :func:`write`.
    """
    transformers = need("transformers", extra="hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(huggingface.minilm_folder())
    model = _minilm()
    answers = sorted({item.answer for item in items})
    tree: dict[str, Any] = {"answers": answers, "parts": {}}
    for task in TASKS:
        for part in PARTS:
            mine = [item for item in items if (item.task, item.part) == (task, part)]
            tokens = tokenizer(
                [item.text for item in mine],
                truncation=True,
                max_length=longest,
                padding="max_length",
                return_tensors="pt",
            )
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
            hidden = torch.zeros(len(mine), longest, model.config.hidden_size)
            # Sorted, so that a batch is as short as it can be.
            for index in mask.sum(1).argsort(stable=True).split(64):
                length = int(mask[index].sum(1).max())
                seen = mask[index, :length]
                with torch.no_grad():
                    out = model.embeddings(ids[index, :length])
                    for layer in model.encoder.layer[:front]:
                        out = layer(out, attention_mask=seen[:, None, None, :].to(torch.bool))
                hidden[index, :length] = out * seen.unsqueeze(-1)
            labels = torch.tensor([answers.index(item.answer) for item in mine])
            tree["parts"].setdefault(task, {})[part] = {
                "hidden": hidden,
                "mask": mask,
                "labels": labels,
            }
    return tree


def write(path: Path, tree: dict[str, Any]) -> None:
    """Write what :func:`encode` made.

    Args:
        path: the file.
        tree: the texts.
    """
    checkpoint.save(path, tree)


@lru_cache(maxsize=1)
def read(path: Path) -> Encoded:
    """Read what :func:`write` wrote, once a process.

    Args:
        path: the file.

    Returns:
        The texts.
    """
    tree = checkpoint.load(path)
    parts = {
        task: {part: Part(**values) for part, values in by_part.items()}
        for task, by_part in tree["parts"].items()
    }
    return Encoded(parts, tree["answers"])


def back(answers: int, *, front: int, rank: int, generator: torch.Generator) -> Back:
    """Return a fresh back.

    Args:
        answers: rows of the head.
        front: layers that the front has.
        rank: of the LoRA factors.
        generator: draws factors and head.

    Returns:
        The model, in training mode.
    """
    model = _minilm()
    layers = list(model.encoder.layer[front:])
    return Back(layers, model.config.hidden_size, answers, rank, generator).train()


@lru_cache(maxsize=1)
def _minilm() -> Any:
    """The pretrained encoder, in eval mode: no dropout."""
    transformers = need("transformers", extra="hf")
    with huggingface._quiet(transformers):
        model = transformers.AutoModel.from_pretrained(
            huggingface.minilm_folder(), use_safetensors=True
        )
    huggingface._without_dropout(model)
    return model.float().eval().requires_grad_(False)
