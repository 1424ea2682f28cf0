"""Batches to evaluate a pretrained model on, from a file of texts or a data set of images."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guywire.core.errors import DataError, UsageError, need
from guywire.lab import streams
from guywire.lab.models import huggingface
from guywire.lab.models.build import prepare
from guywire.lab.streams.lines import text_lines

__all__ = ["image_batches", "read_texts", "text_batches"]

Batch = Any


def read_texts(
    path: Path, text: str = "text", label: str | None = None
) -> list[tuple[str, str | None]]:
    """Read texts, with labels where they are asked for.

    Args:
        path: ``.txt`` (a text a line, empty lines left out), ``.jsonl``, ``.csv`` or ``.tsv`` (with a
            header), or these with ``.gz``.
        text: column of the texts.
        label: column of the labels; ``None`` reads none.

    Returns:
        Pairs of a text and its label, in the order of the file.

    Raises:
        UsageError: there is no such file or column, or it is of another kind.
        DataError: a line is damaged, or there is no text.
    """
    if not os.path.isfile(path):
        raise UsageError(f"there is no file {path} to evaluate on")
    suffix = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    found: list[tuple[str, str | None]] = []
    try:
        if suffix == ".txt":
            if label is not None:
                raise UsageError(f"{path} has no labels: classifiers need .jsonl, .csv or .tsv")
            found = [(line.strip(), None) for line in text_lines(path) if line.strip()]
        elif suffix in (".jsonl", ".csv", ".tsv"):
            for number, row in _rows(path, suffix):
                for column in (text, label):
                    if column is not None and row.get(column) is None:
                        raise UsageError(
                            f"line {number} of {path} has no {column!r} but {', '.join(map(str, row))[:200]}: name "
                            "the columns with --text-column and --label-column"
                        )
                if str(row[text]).strip():
                    found.append((str(row[text]), None if label is None else str(row[label])))
        else:
            raise UsageError(f"{path} is none of .txt, .jsonl, .csv and .tsv")
    except (UsageError, DataError):
        raise
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not found:
        raise DataError(f"{path} has no texts")
    return found


def text_batches(
    rows: list[tuple[str, str | None]],
    source: str,
    config: Any,
    *,
    length: int,
    batch_size: int,
) -> list[dict[str, Tensor]]:
    """Turn texts into batches, those of about the same length together.

    Without labels each text is its own label, as for a causal language model.

    Args:
        rows: texts and labels, from :func:`read_texts`.
        source: folder or hub id of the tokenizer.
        config: of the model: names of classes.
        length: tokens of a text, at most.
        batch_size: texts a batch.

    Returns:
        Dicts with ``input_ids``, ``attention_mask`` and ``labels``; padding is on the right and has
        the label -100.

    Raises:
        DataError: the tokenizer cannot be loaded.
        UsageError: a label is none of the model's.
    """
    transformers = need("transformers", extra="hf")
    with huggingface._loading(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        limit = min(length, tokenizer.model_max_length)
        ids = tokenizer([text for text, _ in rows], truncation=True, max_length=limit)["input_ids"]
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    labels = [None if label is None else class_number(label, config) for _, label in rows]
    order = sorted(range(len(rows)), key=lambda i: (len(ids[i]), i))
    batches = []
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        longest = max(1, *(len(ids[i]) for i in chosen))
        tokens = torch.full((len(chosen), longest), pad)
        mask = torch.zeros((len(chosen), longest), dtype=torch.long)
        for row, i in enumerate(chosen):
            tokens[row, : len(ids[i])] = torch.tensor(ids[i])
            mask[row, : len(ids[i])] = 1
        if labels[chosen[0]] is None:
            target = tokens.masked_fill(mask == 0, -100)
        else:
            target = torch.tensor([labels[i] for i in chosen])
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": target})
    return batches


def image_batches(
    data: str, source: str, config: Any, *, samples: int | None, batch_size: int
) -> list[dict[str, Tensor]]:
    """Turn the test images of a data set into batches, as a model was trained to see them.

    Args:
        data: as for ``StreamConfig``: a name, a folder of images by class, a parquet file.
        source: folder or hub id with the image processor.
        config: of the model: names of classes.
        samples: at most so many, drawn once; ``None`` for all.
        batch_size: images a batch.

    Returns:
        Dicts with ``pixel_values`` and ``labels``.

    Raises:
        UsageError: there are no such data, or a class is none of the model's.
        DataError: they cannot be read.
    """
    stream = streams.load(streams.StreamConfig(data=data, tasks=1))
    numbers = torch.tensor([class_number(name, config) for name in stream.class_names])
    stream = prepare(f"hf:{source}", stream)
    split = stream.tasks[0].test
    if samples is not None and samples < len(split):
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        split = split.subset(order[:samples].sort().values)
    return [
        {"pixel_values": batch[0], "labels": numbers[batch[1]]}
        for batch in stream.batches(split, batch_size)
        if isinstance(batch, tuple)
    ]


def class_number(label: str, config: Any) -> int:
    """Return the number that a model gives to a class.

    Args:
        label: its name, or the number itself.
        config: of the model.

    Returns:
        The number.

    Raises:
        UsageError: the model has no such class.
    """
    known: Mapping[str, int] = getattr(config, "label2id", None) or {}
    if label in known:
        return int(known[label])
    try:
        number = int(label)
    except ValueError:
        number = -1
    if not 0 <= number < int(config.num_labels):
        names = ", ".join(list(known)[:5])
        raise UsageError(
            f"the label {label[:80]!r} is none of the model's {config.num_labels} classes ({names}, ...): "
            "labels must be its names or its numbers"
        )
    return number


def _rows(path: Path, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if suffix == ".jsonl":
        for number, line in enumerate(text_lines(path), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"line {number} of {path} is no JSON object")
                yield number, row
        return
    reader = csv.DictReader(text_lines(path), delimiter="\t" if suffix == ".tsv" else ",")
    for row in reader:
        yield reader.line_num, row
