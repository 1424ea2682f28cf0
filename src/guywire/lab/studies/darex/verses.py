"""Part B: a pretrained sentence encoder learns which kind of book a verse is from; then it is pruned."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import losses
from guywire.core.errors import need
from guywire.lab import streams
from guywire.lab.models.huggingface import Encoder, minilm_folder
from guywire.lab.models.seeding import seeded
from guywire.lab.studies.darex import pruning
from guywire.lab.studies.darex.pruning import Bed
from guywire.lab.studies.fisher_sequential_transfer.text_pairs import read_verses
from guywire.lab.studies.study import Work

__all__ = ["GENRES", "METHODS", "TextClassifier", "bible", "genres", "prune_verses"]

GENRES = {
    "law": "Ge Exo Lev Num Deu",
    "history": "Josh Jdgs Ruth 1Sm 2Sm 1Ki 2Ki 1Chr 2Chr Ezra Neh Est",
    "wisdom": "Job Psa Prv Eccl SSol",
    "prophets": "Isa Jer Lam Eze Dan Hos Joel Amos Obad Jonah Mic Nahum Hab Zep Hag Zec Mal",
    "New Testament": "Mat Mark Luke John Acts Rom 1Cor 2Cor Gal Eph Phi Col 1Th 2Th 1Tim 2Tim Titus "
    "Phmn Heb Jas 1Pet 2Pet 1Jn 2Jn 3Jn Jude Rev",
}
"""Kinds of books, by the names that the file uses."""

METHODS = tuple(method for method in pruning.METHODS if method != "1/q by layer, eta")
"""The third search is left out: a forward pass of this encoder is most of the study's time."""


class TextClassifier(nn.Module):
    """A sentence encoder, which is pruned, and a linear head.

    Args:
        encoder: returns one vector a text.
        classes: how many.
    """

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits.

        Args:
            input_ids: tokens, ``[B, L]``.
            attention_mask: 1 for tokens, ``[B, L]``.

        Returns:
            ``[B, classes]``.
        """
        return self.head(self.encoder(input_ids=input_ids, attention_mask=attention_mask))


def prune_verses(work: Work) -> list[dict[str, Any]]:
    """Fine-tune the whole encoder and prune it by every method.

    Args:
        work: of the study.

    Returns:
        Rows, as those of part A.
    """
    s = work.settings
    train, valid, test = (
        _tokens(part, s["tokens"])
        for part in genres(
            bible(),
            (s["steps"] * s["verse_batch"], s["verses_valid"], s["verses_test"]),
            work.number("verses") % 2**31,
        )
    )
    with seeded(work.generator("head")):
        classifier = TextClassifier(_minilm(), len(GENRES))
    base = {n: p.detach().clone() for n, p in classifier.named_parameters()}
    body = [p for n, p in classifier.named_parameters() if not n.startswith("head.")]
    optimizer = torch.optim.AdamW(
        [
            {"params": body, "lr": s["verse_rate"]},
            {"params": classifier.head.parameters(), "lr": 10 * s["verse_rate"]},
        ],
        weight_decay=0.0,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, s["steps"])
    classifier.train()
    for batch in _batches(train, s["verse_batch"]):
        labels = batch.pop("labels")
        loss = losses.cross_entropy(classifier(**batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tuned = {n: p.detach().clone() for n, p in classifier.named_parameters()}
    bed = Bed(
        classifier,
        base,
        tuned,
        _batches(_by_length(valid), 64),
        _batches(_by_length(test), 64),
        range(s["verse_masks"]),
        range(100, 100 + s["verse_masks"]),
    )
    rows = [_named(work, "unpruned", "accuracy", pruning.accuracy(classifier, bed.test))]
    for dropped in s["verse_rates"]:
        for method, found in pruning.measure(bed, dropped, METHODS).items():
            rows += [
                _named(work, method, f"accuracy at {dropped}", found.accuracy),
                _named(work, method, f"spread at {dropped}", found.spread),
                _named(work, method, f"q at {dropped}", found.q),
            ]
    return rows


@lru_cache(maxsize=1)
def bible() -> tuple[tuple[str, str], ...]:
    """Return the verses as ``(book, text)``.

    Returns:
        All of them in order.
    """
    return tuple((v.book, v.text) for v in read_verses(data_file()))


def data_file() -> Path:
    """Return where the King James Bible is sought.

    Returns:
        The path.
    """
    return streams.data_folder() / "kjv.txt.gz"


def genres(
    verses: Sequence[tuple[str, str]], sizes: Sequence[int], seed: int
) -> list[tuple[list[str], list[int]]]:
    """Draw verses with the number of their genre: as many of each, none twice.

    Args:
        verses: ``(book, text)``.
        sizes: of each part.
        seed: of the draw.

    Returns:
        Texts and labels of each part, genres in turn; equal texts are in one part only.
    """
    number = {book: i for i, books in enumerate(GENRES.values()) for book in books.split()}
    known = dict.fromkeys((text, number[book]) for book, text in verses if book in number)
    first: dict[str, int] = {}
    for text, label in known:  # a verse that two genres share goes to the first
        first.setdefault(text, label)
    piles: list[list[str]] = [[] for _ in GENRES]
    for text, label in first.items():
        piles[label].append(text)
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(len(pile), generator=generator).tolist() for pile in piles]
    at, parts = 0, []
    for size in sizes:
        texts, labels = [], []
        for i in range(at, at + size):
            label = i % len(piles)
            texts.append(piles[label][order[label][i // len(piles)]])
            labels.append(label)
        at += size
        parts.append((texts, labels))
    return parts


def _minilm() -> Encoder:
    transformers = need("transformers", extra="hf")
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = transformers.AutoModel.from_pretrained(
            minilm_folder(), use_safetensors=True,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    finally:
        if shown:
            logging.enable_progress_bar()
    model.pooler = None  # features are taken before it
    return Encoder(model.float(), "text", model.config.hidden_size)


def _tokens(part: tuple[list[str], list[int]], most: int) -> dict[str, Tensor]:
    transformers = need("transformers", extra="hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    texts, labels = part
    found = tokenizer(texts, truncation=True, max_length=most, padding=True, return_tensors="pt")
    return {
        "input_ids": found["input_ids"],
        "attention_mask": found["attention_mask"],
        "labels": torch.tensor(labels),
    }


def _by_length(part: dict[str, Tensor]) -> dict[str, Tensor]:
    order = part["attention_mask"].sum(1).argsort(stable=True)
    return {key: value[order] for key, value in part.items()}


def _batches(part: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    found = []
    for rows in torch.arange(len(part["labels"])).split(size):
        batch = {key: value[rows] for key, value in part.items()}
        longest = int(batch["attention_mask"].sum(1).max())
        found.append({k: v if v.dim() == 1 else v[:, :longest] for k, v in batch.items()})
    return found


def _named(work: Work, method: str, metric: str, value: float) -> dict[str, Any]:
    return {**work.row(metric, value), "condition": f"verses: {method}"}
