"""Calibration inputs from a file: tensors by layer, or texts that the fine-tuned models read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guywire.core.errors import DataError, UsageError, need
from guywire.methods.merging._choose import TRANSPOSED
from guywire.methods.merging._editor import Inputs
from guywire.methods.merging.files import Checkpoint
from guywire.methods.merging.inputs import layer_inputs
from guywire.methods.merging.lora import Adapter
from guywire.methods.merging.matching import FLOATS, Tuned

__all__ = ["calibration"]

_TEXTS, _TOKENS, _BATCH = 50, 128, 10  # the paper's: 50 sequences of 128 tokens
_ROWS = 512
_TOKENISERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")

Calibration = Callable[[Checkpoint, Sequence[Tuned]], Sequence[Mapping[str, Inputs]]]


def calibration(path: str | os.PathLike[str]) -> Calibration:
    """Return what gives calibration inputs to :func:`~guywire.methods.merging.merge_checkpoints`.

    A ``.safetensors`` file holds, under the name of each layer, some of its inputs ``[n, in]``; they
    serve all models. A ``.txt`` file (a text a line) or ``.jsonl`` file (objects with ``"text"``) is
    read by each fine-tuned model with ``transformers``: 50 texts, at most 128 tokens of each.

    Args:
        path: of the file.

    Returns:
        A function of the base and the models.

    Raises:
        DataError: there is no such file, or nothing in it.
        UsageError: it is of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no calibration file {path}")
    if path.suffix == ".safetensors":
        return lambda base, models: [_tensors(path, base)] * len(models)
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(
            f"{path} is no calibration file: give .safetensors (inputs by layer), .txt (a text a line) "
            'or .jsonl (objects with "text")'
        )
    texts = _texts(path)
    return lambda base, models: [_read_by(model, base, texts) for model in models]


def _tensors(path: Path, base: Checkpoint) -> dict[str, Inputs]:
    turned = base.config().get("model_type") in TRANSPOSED
    found = {}
    with Checkpoint(path) as file:
        for name, entry in file.tensors.items():
            if len(entry.shape) < 2 or entry.dtype not in FLOATS or not entry.numel:
                raise DataError(
                    f"{path}: {name!r} is {entry.dtype} of shape {entry.shape}: inputs of a layer are "
                    "floats [n, in]"
                )
            rows = file.read(name).view(-1, entry.shape[-1]).float()
            if not bool(rows.isfinite().all()):
                raise DataError(f"{path}: {name!r} holds NaN or infinity")
            some = rows[:: max(1, len(rows) // _ROWS)][:_ROWS]
            found[name] = Inputs(some, rows.norm(dim=0), turned or None)
    if not found:
        raise DataError(f"{path} holds no inputs")
    return found


def _texts(path: Path) -> list[str]:
    texts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} as text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            value: Any = None
            with suppress(ValueError, RecursionError):
                value = json.loads(line)
            if not isinstance(value, dict) or not isinstance(value.get("text"), str):
                raise DataError(f'{path}, line {number}: an object with "text" is due')
            line = value["text"]
        texts.append(line)
        if len(texts) == _TEXTS:
            break
    if not texts:
        raise DataError(f"{path} holds no text")
    return texts


def _read_by(model: Tuned, base: Checkpoint, texts: list[str]) -> dict[str, Inputs]:
    if isinstance(model, Adapter):
        raise UsageError(
            f"{model.path} is an adapter: texts are read by full models only; merge it with "
            "merge_and_unload, or give inputs by layer as a .safetensors file"
        )
    transformers = need("transformers", extra="hf")
    architecture = (model.config().get("architectures") or ["AutoModel"])[0]
    kind = getattr(transformers, architecture, transformers.AutoModel)
    try:
        network = kind.from_pretrained(model.folder, dtype=torch.float32).eval()
        tokenizer = _tokenizer(transformers, [model.folder, base.folder])
        data = list(_batches(network, tokenizer, texts))
        seen = layer_inputs(network, data, rows=_ROWS)
    except (OSError, RuntimeError, TypeError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{model.path} cannot read the calibration texts ({reason}): give inputs by layer as a "
            ".safetensors file"
        ) from error
    return {
        name: Inputs(inputs.rows, inputs.norms, inputs.transposed) for name, inputs in seen.items()
    }


def _tokenizer(transformers: Any, folders: list[Path]) -> Any:
    for folder in folders:
        # For a folder without one transformers makes an empty tokenizer of the model's kind.
        if not any((folder / name).is_file() for name in _TOKENISERS):
            continue
        with suppress(OSError, ValueError):
            return transformers.AutoTokenizer.from_pretrained(folder)
    raise DataError(
        f"there is no tokenizer in {folders[0]} nor in {folders[1]}: give inputs by layer as a "
        ".safetensors file"
    )


def _batches(network: Any, tokenizer: Any, texts: list[str]) -> Any:
    ids = [tokenizer(t, truncation=True, max_length=_TOKENS)["input_ids"] for t in texts]
    ids = [row for row in ids if row]
    if not ids:
        raise DataError("the tokenizer makes nothing of the calibration texts: give others")
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    for start in range(0, len(ids), _BATCH):
        some = ids[start : start + _BATCH]
        width = max(map(len, some))
        tokens = torch.full((len(some), width), pad)
        mask: Tensor = torch.zeros(len(some), width, dtype=torch.int64)
        for i, row in enumerate(some):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        batch = {"input_ids": tokens, "attention_mask": mask}
        if getattr(network.config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = tokens
        yield batch
