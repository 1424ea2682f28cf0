"""Texts for sequential transfer: gap-sentence pairs for stage A, paired texts for stage B.

From the King James Bible (stage A outside poetry, stage B the halves of verses of Psalms, Proverbs
and Job), or from a file of documents and summaries (stage A on the training documents alone).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from guywire.core.errors import DataError
from guywire.lab.studies.fisher_sequential_transfer import gap_sentences, text_pairs
from guywire.lab.studies.fisher_sequential_transfer.text_pairs import Pair

__all__ = ["data_file", "make_texts"]

POETRY = ("Job", "Psa", "Prv", "Eccl", "SSol", "Lam")
PARALLEL = ("Job", "Psa", "Prv")
WINDOW = 5

Document = tuple[list[str], str | None]
"""Sentences, and the summary if there is one."""


def data_file(settings: Mapping[str, Any]) -> Path:
    """Return the file that the texts come from.

    Args:
        settings: of the study.

    Returns:
        The path.

    Raises:
        DataError: it is to be the Bible, and ``GUYWIRE_DATA`` is not set.
    """
    if settings["data"] is not None:
        return Path(settings["data"])
    folder = os.environ.get("GUYWIRE_DATA")
    if not folder:
        raise DataError(
            "this study reads kjv.txt.gz in the folder $GUYWIRE_DATA, which is not set: set it, or "
            "give pairs of your own with --data FILE"
        )
    return Path(folder) / "kjv.txt.gz"


def make_texts(settings: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Make the pairs of both stages; the held-out groups are the same in every run.

    Args:
        settings: of the study.

    Returns:
        ``a_train``, ``a_valid`` (pairs of gap sentences), ``b_train``, ``b_valid``, ``b_test``.

    Raises:
        DataError: the data cannot be read, or are too few.
    """
    generator = torch.Generator().manual_seed(0)
    path = data_file(settings)
    if settings["data"] is None:
        learning, held_out, parts = _bible(path, generator)
    else:
        learning, held_out, parts = _reports(path, settings, generator)
    weight = gap_sentences.sentence_weight()
    texts: dict[str, list[tuple[str, str]]] = {}
    for name, documents, most in (
        ("a_train", learning, settings["windows"]),
        ("a_valid", held_out, settings["evaluated"]),
    ):
        if not documents:
            raise DataError(f"{path} has no document of two sentences or more for {name}")
        order = torch.randperm(len(documents), generator=generator).tolist()[:most]
        texts[name] = [_hide(documents[i], weight, settings) for i in order]
    for name, part in zip(("b_train", "b_valid", "b_test"), parts, strict=True):
        texts[name] = [(pair.source, pair.target) for pair in part]
    return texts


def _hide(document: Document, weight: Any, settings: Mapping[str, Any]) -> tuple[str, str]:
    sentences, summary = document
    reference = summary if settings["gap_reference"] == "summary" else None
    weights = gap_sentences.weigh(sentences, weight, reference)
    stop = " " if settings["data"] is None else ". "  # verses have their own stops
    return gap_sentences.gap_pair(sentences, weights, most=settings["masked"], stop=stop)


def _bible(
    path: Path, generator: torch.Generator
) -> tuple[list[Document], list[Document], Sequence[list[Pair]]]:
    verses = text_pairs.read_verses(path)
    prose = [verse for verse in verses if verse.book not in POETRY]
    # A window is a document, a chapter its group: held-out windows come from other chapters.
    cut = text_pairs.windows(prose, WINDOW)
    chapters = list(dict.fromkeys(name for name, _ in cut))
    order = torch.randperm(len(chapters), generator=generator).tolist()
    away = {chapters[i] for i in order[: len(chapters) // 12]}
    learning: list[Document] = [(texts, None) for name, texts in cut if name not in away]
    held_out: list[Document] = [(texts, None) for name, texts in cut if name in away]
    halves = text_pairs.half_verses([verse for verse in verses if verse.book in PARALLEL])
    return learning, held_out, text_pairs.split(halves, valid=0.1, test=0.12, generator=generator)


def _reports(
    path: Path, settings: Mapping[str, Any], generator: torch.Generator
) -> tuple[list[Document], list[Document], Sequence[list[Pair]]]:
    pairs = text_pairs.read_pairs(
        path, settings["source_column"], settings["target_column"], settings["group_column"]
    )
    parts = text_pairs.split(pairs, valid=0.1, test=0.1, generator=generator)
    documents: list[list[Document]] = [
        [
            (sentences, pair.target)
            for pair in part
            if len(sentences := gap_sentences.split_sentences(pair.source)) >= 2
        ]
        for part in parts[:2]
    ]
    return documents[0], documents[1], parts
