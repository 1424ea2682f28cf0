"""Part B: MiniLM with half of its weights, repaired on verses without labels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import guywire as gw
from guywire.core.errors import need
from guywire.lab import streams
from guywire.lab.models.huggingface import minilm_folder
from guywire.lab.studies.fisher_sequential_transfer.text_pairs import Verse, read_verses
from guywire.lab.studies.study import Work

__all__ = ["repair_sentences"]

_GENRES = (
    ("Ge", "Deu"), ("Josh", "Est"), ("Job", "SSol"), ("Isa", "Mal"), ("Mat", "Acts"), ("Rom", "Jude"),
)  # fmt: skip
_LENGTH = 32


def repair_sentences(work: Work, *, rate: float, tune: bool = False) -> list[dict[str, Any]]:
    """Factorise MiniLM at ratio 2, hold its blocks to the original's on verses, compare embeddings.

    Args:
        work: of the study.
        rate: learning rate.
        tune: only the cosine after the repair, on a few verses.

    Returns:
        Rows: mean cosine to the original's embeddings before and after, how well each tells a
        verse's genre, and a forward pass's time at ratio 3.
    """
    s = work.settings
    transformers = need("transformers", extra="hf")
    teacher = transformers.AutoModel.from_pretrained(minilm_folder()).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    fit, probe, test = _verses(work, (s["b_fit"], s["b_probe"], s["b_test"]))
    model = gw.factorize(teacher, 2.0)

    def batch(texts: Sequence[str]) -> dict[str, Tensor]:
        made = tokenizer(
            list(texts), padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt"
        )
        return dict(made)

    def embedded(one: nn.Module) -> tuple[Tensor, Tensor]:
        return tuple(_embed(one, [t for t, _ in part], batch) for part in (probe, test))  # pyright: ignore

    if tune:
        few = [text for text, _ in probe[:64]]
        _repair(work, model, teacher, [t for t, _ in fit], batch, rate)
        near = (_embed(model, few, batch) * _embed(teacher, few, batch)).sum(1).mean()
        return [work.row("valid", float(near))]
    labels = [torch.tensor([genre for _, genre in part]) for part in (probe, test)]
    wanted, start = embedded(teacher), embedded(model)
    rows = [
        work.row(
            "time", _time(gw.factorize(teacher, 3.0), teacher, batch([t for t, _ in test[:16]]))
        )
    ]
    _repair(work, model, teacher, [t for t, _ in fit], batch, rate)
    end = embedded(model)
    for name, found in (("before", start), ("after", end)):
        rows.append(work.row(f"cosine_{name}", float((found[1] * wanted[1]).sum(1).mean())))
    for name, found in (("original", wanted), ("before", start), ("after", end)):
        rows.append(work.row(f"probe_{name}", _probe(found, labels)))
    return rows


def _repair(
    work: Work, model: nn.Module, teacher: nn.Module, texts: Sequence[str], batch: Any, rate: float
) -> None:
    s = work.settings
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    generator = work.generator("batches")
    model.train()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    with gw.attach(model, optimizer, gw.PELA(teacher, perturbation=0.0)) as wires:
        for step in range(s["b_steps"]):
            chosen = torch.randint(len(texts), (s["b_batch"],), generator=generator).tolist()
            data = batch([texts[i] for i in chosen])
            for group in optimizer.param_groups:
                group["lr"] = rate * (1.0 - step / s["b_steps"])
            optimizer.zero_grad()
            wires.loss(data, model(**data)).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def _embed(model: nn.Module, texts: Sequence[str], batch: Any) -> Tensor:
    """Return unit vectors: the mean over tokens, as the model's makers take it."""
    model.eval()
    # By length, so that little of a batch is padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        data = batch([texts[i] for i in chosen])
        hidden = model(**data).last_hidden_state
        mask = data["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        vectors = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        for i, vector in zip(chosen, vectors, strict=True):
            out[i] = vector
    return torch.stack(out)


def _probe(vectors: tuple[Tensor, Tensor], labels: Sequence[Tensor]) -> float:
    """Return the test accuracy of a logistic regression on embeddings, with a small decay."""
    weight = torch.zeros(vectors[0].shape[1], len(_GENRES), requires_grad=True)
    bias = torch.zeros(len(_GENRES), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(vectors[0] @ weight + bias, labels[0])
        loss = loss + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    found = (vectors[1] @ weight.detach() + bias.detach()).argmax(1)
    return float((found == labels[1]).float().mean())


def _verses(work: Work, sizes: Sequence[int]) -> list[list[tuple[str, int]]]:
    """Return verses with their genre for repair, probe and test; no chapter is in two of them."""
    verses = read_verses(streams.data_folder() / "kjv.txt.gz")
    books = list(dict.fromkeys(verse.book for verse in verses))
    genre = {
        book: number
        for number, (first, last) in enumerate(_GENRES)
        for book in books[books.index(first) : books.index(last) + 1]
    }
    chapters: dict[tuple[str, int], list[Verse]] = {}
    for verse in verses:
        if verse.book in genre:
            chapters.setdefault((verse.book, verse.chapter), []).append(verse)
    names = list(chapters)
    generator = work.generator("verses")
    order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    parts = []
    for number, size in enumerate(sizes):
        pool = [v for name in order[number :: len(sizes)] for v in chapters[name]]
        chosen = torch.randperm(len(pool), generator=generator)[:size].tolist()
        parts.append([(pool[i].text, genre[pool[i].book]) for i in chosen])
    return parts


@torch.no_grad()
def _time(model: nn.Module, teacher: nn.Module, data: dict[str, Tensor], rounds: int = 5) -> float:
    ratios = []
    for _ in range(rounds):
        spent = []
        for one in (teacher, model):
            begun = time.process_time()
            one(**data)
            spent.append(time.process_time() - begun)
        ratios.append(spent[1] / spent[0])
    return statistics.median(ratios)
