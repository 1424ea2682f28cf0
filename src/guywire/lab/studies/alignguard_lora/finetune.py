"""One fine-tuning on the Gospels, and what is left of the refusals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

import guywire as gw
from guywire.core.regularizer import Regularizer
from guywire.lab.studies.alignguard_lora.arms import batches_of, dress, holds
from guywire.lab.studies.alignguard_lora.network import (
    base_model,
    load_data,
    negative_log_likelihood,
    refusals,
    token_losses,
)
from guywire.lab.studies.alignguard_lora.texts import Prompts
from guywire.lab.studies.study import Work

__all__ = ["choose", "learn"]


def choose(
    work: Work, *, arm: str, rate: float, strength: float = 0.0, target: float = 0.0
) -> list[dict[str, Any]]:
    """Fine-tune and measure on validation books, in which there is nothing to refuse.

    Args:
        work: of the study.
        arm: as in ``arms.ARMS``.
        rate: of Adam.
        strength: of the penalty.
        target: the loss on the new domain that strengths are chosen to meet; 0 where there is none.

    Returns:
        Rows: ``valid loss``, and ``off target``, how far it is from the target as a share of it.
    """
    ((_, model, _),) = _tuned(work, arm, rate, strength, [work.settings["steps"]])
    loss = negative_log_likelihood(model, load_data(work.settings).benign["valid"])
    rows = [work.row("valid loss", loss)]
    return rows + ([work.row("off target", abs(loss / target - 1.0))] if target else [])


def learn(
    work: Work, *, arm: str, rate: float, strength: float = 0.0, curve: bool = False
) -> list[dict[str, Any]]:
    """Fine-tune and measure on test books.

    Args:
        work: of the study.
        arm: as in ``arms.ARMS``.
        rate: of Adam.
        strength: of the penalty.
        curve: go on, and measure the loss on the old domain after various numbers of steps.

    Returns:
        Rows: ``refused`` (of what should be), ``refused wrongly``, ``benign nll``, ``aligned nll``
        and, where the arm has them, the terms of the penalty; with ``curve`` the ``old loss`` by steps.
    """
    s = work.settings
    texts = load_data(s)
    test = texts.aligned["test"]
    rows = []
    stops = sorted({s["steps"], *(s["curve"] if curve else ())})
    for step, model, held in _tuned(work, arm, rate, strength, stops):
        old = negative_log_likelihood(model, test)
        if curve and step in s["curve"]:
            rows.append(work.row("old loss", old, step=step))
        if step != s["steps"]:
            continue
        rows += [
            work.row("refused", refusals(model, test.of(test.unsafe))),
            work.row("refused wrongly", refusals(model, test.of(~test.unsafe))),
            work.row("benign nll", negative_log_likelihood(model, texts.benign["test"])),
            work.row("aligned nll", old),
        ]
        for regularizer in held:
            if isinstance(regularizer, gw.AlignGuardLoRA):
                layers = len(regularizer.basis_)
                terms = regularizer.terms()
                rows += [work.row(name, value / layers) for name, value in terms.items()]
                kept = [basis.shape[1] / basis.shape[0] for basis in regularizer.basis_.values()]
                rows.append(work.row("directions", sum(kept) / layers))
    return rows


def _tuned(
    work: Work, arm: str, rate: float, strength: float, stops: Sequence[int]
) -> Iterator[tuple[int, Any, list[Regularizer]]]:
    """Fine-tune, and show the model and what holds it after these numbers of steps."""
    s = work.settings
    texts = load_data(s)
    train = texts.benign["train"]
    model: Any = dress(base_model(work), arm, s["rank"], work.generator("factors"))
    held = holds(model, arm, strength, batches_of(_alignment(work, texts.aligned["train"])))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=rate)
    draw = work.generator("order")
    with gw.attach(model, optimizer, held):
        for step in range(1, stops[-1] + 1):
            rows = torch.randint(len(train), (s["batch"],), generator=draw)
            optimizer.zero_grad()
            token_losses(model, train.batch(rows)).mean().backward()
            optimizer.step()
            if step in stops:
                yield step, model, held


def _alignment(work: Work, train: Prompts) -> Prompts:
    """Draw as many prompts to refuse as others from what the model was taught."""
    draw = work.generator("alignment")
    half = work.settings["alignment"] // 2
    kinds = (train.unsafe.nonzero()[:, 0], (~train.unsafe).nonzero()[:, 0])
    return train.of(torch.cat([k[torch.randperm(len(k), generator=draw)[:half]] for k in kinds]))
