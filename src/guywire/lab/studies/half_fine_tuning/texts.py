"""Rows of tokens from the King James Bible: a base of narrative books, and a stream of other kinds.

Whole chapters are held out for validation and test, the same in every run. The tokenizer, byte
pairs, learns from the base's training chapters only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guywire.core.errors import need
from guywire.lab import streams
from guywire.lab.studies.fisher_sequential_transfer.text_pairs import Verse, read_verses

__all__ = ["BASE", "STREAM", "Corpus", "chapters", "files", "read", "tokenizer_of"]

BASE = "stories"
"""Genesis to Esther: what the base model is trained on, and may forget."""

STREAM = ("songs", "prophets", "gospels", "letters")
"""The domains of the stream, in their order."""

_FIRST_AND_LAST = {
    "stories": ("Ge", "Est"),
    "songs": ("Psa", "Prv"),
    "prophets": ("Isa", "Mal"),
    "gospels": ("Mat", "John"),
    "letters": ("Rom", "Jude"),
}


@dataclass(frozen=True)
class Corpus:
    """Rows of one domain, ``[rows, length + 1]`` int64, by part; and bytes of text a token."""

    train: Tensor
    valid: Tensor
    test: Tensor
    bytes_a_token: float


def files() -> list[Path]:
    """Return the data file.

    Returns:
        One path.
    """
    return [streams.data_folder() / "kjv.txt.gz"]


@lru_cache(maxsize=1)
def chapters() -> dict[str, dict[str, list[str]]]:
    """Return the texts of chapters by domain and part.

    Every tenth chapter of a domain is for the test and the one after it for validation.

    Returns:
        Domain to ``train``, ``valid`` and ``test``, each a list of chapters.
    """
    verses = read_verses(files()[0])
    books = list(dict.fromkeys(verse.book for verse in verses))
    out: dict[str, dict[str, list[str]]] = {}
    for domain, (first, last) in _FIRST_AND_LAST.items():
        inside = set(books[books.index(first) : books.index(last) + 1])
        whole = _by_chapter([verse for verse in verses if verse.book in inside])
        parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
        for number, text in enumerate(whole):
            part = {8: "test", 9: "valid"}.get(number % 10, "train")
            parts[part].append(text)
        out[domain] = parts
    return out


def tokenizer_of(texts: Sequence[str], vocabulary: int) -> Any:
    """Train a byte-pair tokenizer.

    Args:
        texts: to learn from.
        vocabulary: how many tokens.

    Returns:
        A ``tokenizers.Tokenizer``.
    """
    tokenizers = need("tokenizers", extra="hf")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return made


@lru_cache(maxsize=2)
def read(tokenizer: str, length: int) -> dict[str, Corpus]:
    """Return the rows of all domains.

    Args:
        tokenizer: as JSON.
        length: tokens a row that are predicted.

    Returns:
        Domain to corpus.
    """
    made = need("tokenizers", extra="hf").Tokenizer.from_str(tokenizer)
    out: dict[str, Corpus] = {}
    for domain, parts in chapters().items():
        rows = {part: _rows(made, texts, length) for part, texts in parts.items()}
        size = sum(len(text.encode()) for text in parts["test"])
        tokens = sum(len(code.ids) for code in made.encode_batch(parts["test"]))
        out[domain] = Corpus(**rows, bytes_a_token=size / tokens)
    return out


def _by_chapter(verses: Sequence[Verse]) -> list[str]:
    texts: dict[tuple[str, int], list[str]] = {}
    for verse in verses:
        texts.setdefault((verse.book, verse.chapter), []).append(verse.text)
    return ["\n".join(lines) + "\n\n" for lines in texts.values()]


def _rows(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    ids = torch.tensor([i for code in tokenizer.encode_batch(list(texts)) for i in code.ids])
    # Rows overlap by one token, so that each token but the first is predicted once.
    count = (len(ids) - 1) // length
    starts = torch.arange(count) * length
    return ids[starts[:, None] + torch.arange(length + 1)]
