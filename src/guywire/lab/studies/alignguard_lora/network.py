"""A small language model, taught to refuse, and what is measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guywire.core import checkpoint
from guywire.core.errors import need
from guywire.lab import streams
from guywire.lab.models.seeding import seeded
from guywire.lab.studies.alignguard_lora.texts import REFUSE, Prompts, Texts, load_texts
from guywire.lab.studies.study import Work

__all__ = [
    "base_model",
    "load_data",
    "negative_log_likelihood",
    "refusals",
    "teach",
    "token_losses",
]

_FILE = "aligned.safetensors"
_BATCH = 64


def load_data(settings: Mapping[str, Any]) -> Texts:
    """Return the data of the study.

    Args:
        settings: of the study.

    Returns:
        The texts.
    """
    path = streams.data_folder() / "kjv.txt.gz"
    return load_texts(path, settings["vocabulary"], settings["length"], settings["evaluated"])


def teach(work: Work) -> list[dict[str, Any]]:
    """Train the model on verses and refusals; leave its weights for all others.

    Args:
        work: of the study.

    Returns:
        Rows: how often it refuses what it should and what it should not, and its loss.
    """
    s = work.settings
    texts = load_data(s)
    train = texts.aligned["train"]
    model = _build(s, texts.words, work.generator("weights"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["start_rate"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        s["start_rate"],
        total_steps=s["start_steps"],
        pct_start=0.1,
        cycle_momentum=False,
    )
    draw = work.generator("start")
    refused, safe = train.unsafe.nonzero()[:, 0], (~train.unsafe).nonzero()[:, 0]
    n = round(s["refused_share"] * s["start_batch"])
    model.train()
    for _ in range(s["start_steps"]):
        rows = torch.cat([_draw(refused, n, draw), _draw(safe, s["start_batch"] - n, draw)])
        loss = token_losses(model, train.batch(rows, answers=False)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    checkpoint.save(work.leaves(_FILE), {"weights": dict(model.state_dict())})
    test = texts.aligned["test"]
    return [
        work.row("refused", refusals(model, test.of(test.unsafe))),
        work.row("refused wrongly", refusals(model, test.of(~test.unsafe))),
        work.row("aligned nll", negative_log_likelihood(model, test)),
        work.row("benign nll", negative_log_likelihood(model, texts.benign["test"])),
        work.row("valid loss", negative_log_likelihood(model, texts.benign["valid"])),
    ]


def base_model(work: Work) -> Any:
    """Return the model that :func:`teach` left.

    Args:
        work: of the study.

    Returns:
        A Llama of transformers, in eval mode.
    """
    texts = load_data(work.settings)
    model = _build(work.settings, texts.words, torch.Generator().manual_seed(0))
    model.load_state_dict(checkpoint.load(work.folder / _FILE)["weights"])
    return model.eval()


@torch.no_grad()
def refusals(model: Any, prompts: Prompts) -> float:
    """Return how often the model answers with a refusal.

    Args:
        model: the language model.
        prompts: all of one kind.

    Returns:
        The share whose likeliest first token is REFUSE.
    """
    right = 0
    for rows in torch.arange(len(prompts)).split(_BATCH):
        asked = prompts.asked[rows]
        ids = prompts.ids[rows, : int(asked.max()) + 1]  # what follows ASK is not looked at
        logits = model(input_ids=ids, logits_to_keep=asked.unique()).logits
        places = torch.searchsorted(asked.unique(), asked)
        right += int((logits[torch.arange(len(ids)), places].argmax(-1) == REFUSE).sum())
    return right / len(prompts)


@torch.no_grad()
def negative_log_likelihood(model: Any, prompts: Prompts) -> float:
    """Return the loss on a token of the answers.

    Args:
        model: the language model.
        prompts: with their answers.

    Returns:
        Nats, the mean over tokens.
    """
    total, count = 0.0, 0
    for rows in torch.arange(len(prompts)).split(_BATCH):
        losses = token_losses(model, prompts.batch(rows))
        total += float(losses.sum())
        count += len(losses)
    return total / count


def token_losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of each token that counts; the head runs on those alone.

    Args:
        model: the language model.
        batch: with labels.

    Returns:
        One loss a token.
    """
    states = model.model(batch["input_ids"], attention_mask=batch["attention_mask"])
    labels = batch["labels"][:, 1:]
    counts = labels != -100
    logits = model.lm_head(states.last_hidden_state[:, :-1][counts])
    return F.cross_entropy(logits, labels[counts], reduction="none")


def _draw(rows: Tensor, n: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randint(len(rows), (n,), generator=generator)]


def _build(settings: Mapping[str, Any], words: int, generator: torch.Generator) -> Any:
    transformers: Any = need("transformers", extra="hf")
    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=settings["width"],
        intermediate_size=3 * settings["width"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["heads"],
        max_position_embeddings=settings["length"],
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with seeded(generator):
        return transformers.LlamaForCausalLM(config)
