"""The loop of the study: task after task with LoRA, and what is measured after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import guywire as gw
from guywire.core import batches, losses
from guywire.core.aside import undisturbed
from guywire.lab.studies.i_lora import encoder
from guywire.lab.studies.i_lora.encoder import Back, Encoded, Part
from guywire.lab.studies.i_lora.texts import TASKS
from guywire.lab.studies.study import Work

__all__ = ["FILE", "learn", "order_of", "regularizers", "walk"]

FILE = "texts.safetensors"
"""What the front makes of all texts; one unit leaves it for the others."""

SLOW = "slow"
FAST = "fast"

Matrix = list[list[float]]


def learn(
    work: Work,
    *,
    arm: str,
    rate: float,
    strength: float = 1.0,
    horizon: float = 30.0,
    tune: bool = False,
) -> list[dict[str, Any]]:
    """Learn the tasks one after another and measure what is left of each.

    Args:
        work: of the study.
        arm: ``sequential``, ``EWC``, ``ER``, ``I-LoRA``, ``one-sided`` or ``joint``.
        rate: learning rate, for Adam.
        strength: of the arm's term.
        horizon: steps that the slow adapter averages.
        tune: the first tasks only, of an order that no seed has, measured on validation data.

    Returns:
        Rows ``accuracy`` (mean over tasks at the end) and ``forgetting`` of the arm's fast adapter
        and, under names of their own, of its averages.
    """
    s = work.settings
    texts = encoder.read(work.folder / FILE)
    model = encoder.back(
        len(texts.answers), front=s["front"], rank=s["rank"], generator=work.generator("weights")
    )
    tasks = order_of(work)[: s["tuning_tasks"] if tune else s["tasks"]]
    part = "valid" if tune else "test"
    held = regularizers(arm, strength, horizon, memory=s["memory"], seed=work.number("memory"))
    averaging = held[0] if held and isinstance(held[0], gw.ILoRA) else None
    shuffling = work.generator("shuffle")
    if arm == "joint":
        return _joint(work, model, texts, tasks, rate, part, shuffling)
    measured: dict[str, Matrix] = {FAST: [], **({SLOW: []} if averaging else {})}
    ends: list[dict[str, Tensor]] = []
    for index, task in enumerate(tasks):
        data = _sample(work, texts.parts[task]["train"])
        _train(model, data, held, rate, s, shuffling)
        ends.append(_moving(model))
        if tune and index < len(tasks) - 1:
            continue
        for kind, matrix in measured.items():
            with averaging.slow(model) if averaging and kind == SLOW else nullcontext():
                matrix.append([_accuracy(model, texts.parts[t][part]) for t in tasks[: index + 1]])
    if tune:
        return [work.row("accuracy", _mean(measured[SLOW if averaging else FAST][-1]))]
    rows = _rows(work, arm, measured)
    if arm == "ER":
        mean = {n: torch.stack([end[n] for end in ends]).mean(0) for n in ends[0]}
        rows += _of(work, model, mean, "ER, mean of task ends", texts, tasks)
    return rows


def walk(work: Work, *, rate: float) -> list[dict[str, Any]]:
    """Learn two tasks, each to its end, and measure the line between the two ends.

    Args:
        work: of the study.
        rate: learning rate, for Adam.

    Returns:
        ``line_gain``, ``line_barrier`` (relative to the lower end), ``line_best``, ``line_distance``,
        and curves of accuracy on the old task, the new one and both.
    """
    s = work.settings
    texts = encoder.read(work.folder / FILE)
    model = encoder.back(
        len(texts.answers), front=s["front"], rank=s["rank"], generator=work.generator("weights")
    )
    shuffling = work.generator("shuffle")
    longer = {**s, "epochs": s["line_epochs"], "batch": s["line_batch"]}
    tasks, ends = order_of(work)[:2], []
    for task in tasks:
        _train(model, _sample(work, texts.parts[task]["train"]), [], rate, longer, shuffling)
        ends.append(_moving(model))
    return _line(work, model, texts, tasks, ends)


def regularizers(
    arm: str, strength: float, horizon: float, *, memory: int, seed: int
) -> list[gw.Regularizer]:
    """Return what an arm attaches. ER is I-LoRA at strength 0: the same memory and draws.

    Args:
        arm: as in :func:`learn`.
        strength: of its term.
        horizon: steps that the slow adapter averages.
        memory: samples kept.
        seed: of the memory.

    Returns:
        The regularizers.

    Example:
        >>> regularizers("EWC", 10.0, 30.0, memory=100, seed=0)
        [EWC(strength=10.0, labels='true')]
    """
    if arm in ("sequential", "joint"):
        return []
    if arm == "EWC":
        return [gw.EWC(strength, labels="true")]
    return [
        gw.ILoRA(
            0.0 if arm == "ER" else strength,
            decay=1.0 - 1.0 / horizon,
            consistency="one_sided" if arm == "one-sided" else "mse",
            capacity=memory,
            seed=seed % 2**31,
        )
    ]


def order_of(work: Work) -> list[str]:
    """Return the order of the tasks: each seed has its own; the first one's is as listed.

    Args:
        work: of the study.

    Returns:
        Names of tasks.
    """
    if work.seed == 0:
        return list(TASKS)
    shuffled = torch.randperm(len(TASKS), generator=work.generator("order"))
    return [TASKS[i] for i in shuffled.tolist()]


def _train(
    model: Back,
    data: Part,
    held: Sequence[gw.Regularizer],
    rate: float,
    settings: Mapping[str, Any],
    generator: torch.Generator,
) -> None:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=rate)
    size = settings["batch"]
    with gw.attach(model, optimizer, held) as wires:
        for _ in range(settings["epochs"]):
            for index in torch.randperm(len(data), generator=generator).split(size):
                batch = data.rows(index)
                outputs = batches.forward(model, batch)
                loss = losses.cross_entropy(outputs, batch["labels"]) + wires.loss(batch, outputs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        wires.consolidate(data.batches(size))


def _joint(
    work: Work,
    model: Back,
    texts: Encoded,
    tasks: Sequence[str],
    rate: float,
    part: str,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    parts = [_sample(work, texts.parts[task]["train"]) for task in tasks]
    every = Part(
        torch.cat([p.hidden for p in parts]),
        torch.cat([p.mask for p in parts]),
        torch.cat([p.labels for p in parts]),
    )
    _train(model, every, [], rate, work.settings, generator)
    accuracy = _mean([_accuracy(model, texts.parts[t][part]) for t in tasks])
    return [work.row("accuracy", accuracy)]


def _sample(work: Work, pool: Part) -> Part:
    """Draw a task's training texts from its pool: other ones for each seed."""
    count = min(work.settings["per_task"], len(pool))
    index = torch.randperm(len(pool), generator=work.generator("texts"))[:count]
    return Part(pool.hidden[index], pool.mask[index], pool.labels[index])


def _rows(work: Work, arm: str, measured: Mapping[str, Matrix]) -> list[dict[str, Any]]:
    """Rows of each adapter. Where both count, the slow one has the arm's name; for ER the fast."""
    rows = []
    for kind, matrix in measured.items():
        main = kind == (SLOW if SLOW in measured and arm != "ER" else FAST)
        name = work.condition if main else f"{work.condition}, {kind}"
        rows.append(work.row("accuracy", _mean(matrix[-1]), condition=name))
        rows.append(work.row("forgetting", _forgetting(matrix), condition=name))
        learnt = _mean([row[-1] for row in matrix])
        rows.append(work.row("learning_accuracy", learnt, condition=name))
        rows += [
            work.row("accuracy_so_far", _mean(row), condition=name, step=i + 1)
            for i, row in enumerate(matrix)
        ]
    return rows


def _of(
    work: Work,
    model: Back,
    values: Mapping[str, Tensor],
    name: str,
    texts: Encoded,
    tasks: Sequence[str],
) -> list[dict[str, Any]]:
    model.load_state_dict(values, strict=False)
    accuracy = _mean([_accuracy(model, texts.parts[t]["test"]) for t in tasks])
    return [work.row("accuracy", accuracy, condition=name)]


def _line(
    work: Work, model: Back, texts: Encoded, tasks: Sequence[str], ends: Sequence[dict[str, Tensor]]
) -> list[dict[str, Any]]:
    """Measure the line from the end of the first task to the end of the second."""
    names = {"old": tasks[0], "new": tasks[1]}
    evals = {name: texts.parts[task]["test"].batches(64) for name, task in names.items()}
    found = gw.diagnostics.connectivity(model, ends[0], ends[1], evals)
    least = min(found.loss["all"][0], found.loss["all"][-1])
    rows = [
        work.row("line_gain", found.gain(metric="accuracy")),
        work.row("line_barrier", found.barrier() / least),
        work.row("line_best", found.best(metric="accuracy")),
        work.row("line_distance", found.distance),
    ]
    for name in ("old", "new", "all"):
        rows += [
            work.row("line_accuracy", value, step=position, condition=f"line: {name}")
            for position, value in zip(found.positions, found.accuracy[name], strict=True)
        ]
    return rows


def _moving(model: Back) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def _accuracy(model: Back, data: Part) -> float:
    right = 0.0
    with undisturbed(model, mode=False), torch.no_grad():
        for batch in data.batches(64):
            logits = batches.forward(model, batch)
            right += float((logits.argmax(-1) == batch["labels"]).sum())
    return right / len(data)


def _forgetting(matrix: Matrix) -> float:
    """Mean over old tasks of the best accuracy ever minus the last one."""
    last = matrix[-1]
    best = [max(row[j] for row in matrix[j:]) for j in range(len(last) - 1)]
    return _mean([b - v for b, v in zip(best, last, strict=False)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
