"""Part A: a pretrained text encoder, of which only the queries, keys and values may move."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch

from guywire.lab import models, streams
from guywire.lab.models import Classifier
from guywire.lab.streams import Stream
from guywire.lab.studies.rehearsal_free_cl.arms import move_only, regularizers
from guywire.lab.studies.rehearsal_free_cl.loop import Recipe, learn
from guywire.lab.studies.study import Work

__all__ = ["learn_captions"]

_MODEL = "minilm"


def learn_captions(
    work: Work, *, arm: str, strength: float = 1.0, tune: bool = False
) -> list[dict[str, Any]]:
    """Learn subgroups of emoji from their captions, a few at a time.

    Args:
        work: of the study.
        arm: ``frozen``, or as in ``arms``.
        strength: of its term.
        tune: the first tasks of a stream in another order of classes, measured on validation data.

    Returns:
        Rows, as ``loop.learn`` makes them.
    """
    s = work.settings
    stream = _stream(s["a_classes"], s["a_tasks"], s["a_per_class"], work.seed, tune)
    model = _encoder(stream)
    held = models.attention_glob(_MODEL)
    move_only(model, [] if arm == "frozen" else held)
    recipe = Recipe(
        regularizers(arm, strength, held=held, memory=s["a_memory"], head="softmax"),
        # With a memory, or with all data at hand, nothing needs to be masked.
        loss="softmax" if arm in ("joint", "Replay") else "masked",
        epochs=s["a_epochs"],
        batch_size=s["a_batch"],
        rate=s["a_rate"],
        head_rate=s["a_head_rate"],
        joint=arm == "joint",
        cosine=True,
    )
    tasks, part = (s["a_tuning_tasks"], "valid") if tune else (s["a_tasks"], "test")
    return learn(work, stream, model, recipe, tasks=tasks, part=part)


@lru_cache(maxsize=2)
def _stream(classes: int, tasks: int, per_class: int, seed: int, tune: bool) -> Stream:
    config = streams.StreamConfig(
        data="renditions",
        text_column="caption",
        classes=classes,
        tasks=tasks,
        max_per_class=per_class,
        test_fraction=0.25,
        # Test captions are the same for all seeds, and never among those that strengths are
        # chosen on; what is not test is all for training once they are chosen.
        valid_fraction=0.25 if tune else 0.0,
        seed=seed,
    )
    return models.prepare(_MODEL, streams.load(config))


def _encoder(stream: Stream) -> Classifier:
    """Return a fresh copy of the pretrained encoder, which is read from disk once a process."""
    if not _LOADED:
        _LOADED.append(models.build(_MODEL, stream, torch.Generator().manual_seed(0)))
    return copy.deepcopy(_LOADED[0])


_LOADED: list[Classifier] = []
