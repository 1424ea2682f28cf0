"""The loop: task after task with one optimiser, watched at every update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import guywire as gw
from guywire.core import losses
from guywire.core.errors import NonFiniteError
from guywire.diagnostics import ContinualMonitor, GradientSplit, gradient_split
from guywire.lab.models.seeding import seeded
from guywire.lab.streams import Split, Stream
from guywire.lab.studies.stability_gap.measure import (
    FIRST,
    FOLLOWING,
    fall,
    share_at_start,
    switch_means,
)
from guywire.lab.studies.stability_gap.series import series
from guywire.lab.studies.study import Work
from guywire.methods.penalties.ewc import ewc_penalty

__all__ = ["ARMS", "learn", "network", "tune", "within_task"]

ARMS = ("finetune", "ER", "ER, all kept", "GEM", "EWC", "LwF")
"""``ER, all kept`` is replay whose memory holds every sample of the past."""

Criterion = Callable[[Tensor, Tensor], Tensor]

_UPDATES = {"styles": "style_updates", "turned": "turned_updates"}
"""Streams that have a number of updates a task of their own, and the setting that says it."""


def learn(
    work: Work, *, stream: str, arm: str, angle: float = 0.0, strength: float = 1.0
) -> list[dict[str, Any]]:
    """Learn a stream and measure what its tasks go through.

    Args:
        work: of the study.
        stream: as in ``series``.
        arm: one of :data:`ARMS`.
        angle: of turned digits.
        strength: of EWC.

    Returns:
        Rows: the monitor's metrics; ``gap`` (average accuracy less WC-ACC); ``drop``, ``regained``,
        ``lowest_after`` and ``half_after`` of the first task; ``stability_start``, ``_peak``,
        ``_share`` and ``_first``; curves ``first_task``, ``plasticity`` and ``stability``.
    """
    s = work.settings
    data = series(stream, s, angle=angle)
    run = _Run(work, data, stream, arm, strength)
    names = [f"task {i + 1}" for i in range(len(data.tasks))]
    groups = {n: task.classes for n, task in zip(names, data.tasks, strict=True)}
    monitor = ContinualMonitor(
        {n: _all(data, task.test) for n, task in zip(names, data.tasks, strict=True)},
        subset=s["evaluated"],
        seed=work.number("evaluated"),
        classes=groups if data.scenario == "task" else None,
    )
    splits: list[dict[int, GradientSplit]] = []
    with monitor.attach(run.model, run.optimizer):
        for index, (name, task) in enumerate(zip(names, data.tasks, strict=True)):
            monitor.begin_task(name)
            splits.append(run.learn(task.train, watch=index > 0, last=index == len(names) - 1))
            monitor.end_task()
    found = monitor.metrics()
    first = {row.step: row.value for row in monitor.curves() if row.evaluated == names[0]}
    length = run.updates
    fell = fall(first, [length * i for i in range(1, len(names))], length, s["near"])
    found |= {"gap": found["average_accuracy"] - found["wc_acc"], **fell._asdict()}
    found["standard_error"] = monitor.standard_error(names[0], found["average_accuracy"])
    found |= _gradients(splits[1:])
    rows = [work.row(metric, value) for metric, value in found.items()]
    rows += [work.row("first_task", value, step=step) for step, value in first.items()]
    for step, (plasticity, stability) in switch_means(splits[1:]).items():
        rows += [
            work.row("plasticity", plasticity, step=step),
            work.row("stability", stability, step=step),
        ]
    return rows


def tune(work: Work, *, stream: str, arm: str, strength: float) -> list[dict[str, Any]]:
    """Learn the first tasks of a stream and measure them on validation data.

    Args:
        work: of the study.
        stream: as in ``series``.
        arm: one of :data:`ARMS`.
        strength: of its term.

    Returns:
        One row, ``accuracy``; NaN where the strength diverged.
    """
    data = series(stream, work.settings, tune=True)
    run = _Run(work, data, stream, arm, strength)
    shown = data.tasks[: work.settings["tuning_tasks"]]
    try:
        for index, task in enumerate(shown):
            run.learn(task.train, watch=False, last=index == len(shown) - 1)
    except NonFiniteError:
        return [work.row("accuracy", math.nan)]
    scores = []
    with torch.no_grad():
        for task in shown:
            x, y = _all(data, task.valid)
            logits = run.model(x)
            if not bool(torch.isfinite(logits).all()):
                return [work.row("accuracy", math.nan)]
            if data.scenario == "task":
                logits = losses.only(logits, task.classes)
            scores.append(float((logits.argmax(1) == y).double().mean()))
    return [work.row("accuracy", sum(scores) / len(scores))]


def network(shape: tuple[int, int, int], classes: int, generator: torch.Generator) -> nn.Sequential:
    """Return the paper's perceptron: two hidden layers of 400, ReLU also before the linear head.

    Args:
        shape: of an image.
        classes: outputs, all of them from the start.
        generator: of the weights.

    Returns:
        The model.
    """
    with seeded(generator):
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(shape), 400),
            nn.ReLU(),
            nn.Linear(400, 400),
            nn.ReLU(),
            nn.Linear(400, classes),
        )


def within_task(per_task: int) -> Criterion:
    """Return the cross entropy over the classes of each sample's own task.

    Args:
        per_task: classes of a task; task ``i`` has ``i * per_task`` and the next ones.

    Returns:
        ``(logits, labels) -> mean loss``; for replay too, whose samples are of several tasks.

    Example:
        >>> loss = within_task(2)
        >>> loss(torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([1]))
        tensor(0.6931)
    """

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        own = torch.div(labels, per_task, rounding_mode="floor")
        rows = torch.arange(len(labels), device=labels.device)
        mine = logits.unflatten(1, (-1, per_task))[rows, own]
        return losses.cross_entropy(mine, labels - own * per_task)

    return criterion


class _Run:
    """A model in training: optimiser, regularizer and criterion stay the same over all tasks."""

    def __init__(self, work: Work, data: Stream, stream: str, arm: str, strength: float) -> None:
        s = work.settings
        self.data = data
        self.updates: int = s.get(_UPDATES.get(stream, ""), s["updates"])
        self.batch: int = s["style_batch"] if stream == "styles" else s["batch"]
        self.every: int = s["split_every"]
        self.model = network(data.shape, len(data.class_names), work.generator("network"))
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=s["rate"], momentum=s["momentum"]
        )
        self.criterion: Criterion = losses.cross_entropy
        if data.scenario == "task":
            self.criterion = within_task(len(data.tasks[0].classes))
        # The paper's replay is w * new + (1 - w) * memory, and w * new while there is no memory.
        self.weight: float = s["new_weight"] if arm.startswith("ER") else 1.0
        self.strength = strength
        self.regularizer = self._regularizer(arm, s, work.number("memory") % 2**31)
        self.wires = gw.attach(
            self.model, self.optimizer, [] if self.regularizer is None else [self.regularizer]
        )
        self.shuffling = work.generator("shuffle")
        self.watching = work.generator("watch")

    def learn(self, train: Split, *, watch: bool, last: bool) -> dict[int, GradientSplit]:
        """Learn one task; return the gradients seen in the steps after its begin."""
        found: dict[int, GradientSplit] = {}
        self.model.train()
        for step, (x, y) in enumerate(self._batches(train)):
            seen = watch and step < FIRST + FOLLOWING
            if seen and (step < 2 * FIRST or step % self.every == 0):
                found[step] = self._split(x, y)
            outputs = self.model(x)
            loss = self.weight * self.criterion(outputs, y) + self.wires.loss((x, y), outputs)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if step in found and isinstance(self.regularizer, gw.GEM):
                # What the projection added to this very step's gradient.
                added = self.regularizer
                found[step] = GradientSplit(
                    found[step].plasticity, added.stability_norm_, added.cosine_
                )
        if not last:
            self.wires.consolidate(self.data.loader(train, self.batch))
        return found

    def _batches(self, train: Split) -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        while done < self.updates:
            for batch in self.data.batches(train, min(self.batch, len(train)), self.shuffling):
                if isinstance(batch, dict) or done == self.updates:
                    return
                yield batch
                done += 1

    def _split(self, x: Tensor, y: Tensor) -> GradientSplit:
        return gradient_split(
            self.model,
            lambda: self.criterion(self.model(x), y),
            lambda: self._stability(x, y),
        )

    def _stability(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Return the term that keeps the old, unscaled; GEM's is known after the step only."""
        held = self.regularizer
        if isinstance(held, gw.Replay):
            # A batch of its own, so that watching draws nothing from replay's generator.
            drawn = None if held.buffer_ is None else held.buffer_.draw(len(y), self.watching)
            return None if drawn is None else self.criterion(self.model(drawn[0]), drawn[1])
        if isinstance(held, gw.EWC):
            if not held.mean_:
                return None
            # wires.penalty() tells the value only; this one has a graph.
            return ewc_penalty(dict(self.model.named_parameters()), held.mean_, held.precision_)
        if isinstance(held, gw.PredictionDistillation):
            return held.loss((x, y), self.model(x))
        return None

    def _regularizer(self, arm: str, s: Any, seed: int) -> gw.Regularizer | None:
        memory = s["style_memory"] if self.data.name == "renditions" else s["memory"]
        if arm == "finetune":
            return None
        if arm.startswith("ER"):
            if arm != "ER":
                counts = torch.cat([t.train.labels for t in self.data.tasks]).bincount()
                # Room for as much of every class as there is of the largest.
                memory = len(counts) * int(counts.max())
            return gw.Replay(
                memory,
                strength=1.0 - s["new_weight"],
                buffer="balanced",
                criterion=self.criterion,
                seed=seed,
            )
        if arm == "GEM":
            return gw.GEM(memory // len(self.data.tasks), margin=0.5, criterion=self.criterion)
        if arm == "EWC":
            return gw.EWC(self.strength)
        return gw.PredictionDistillation(1.0, temperature=2.0)


def _all(data: Stream, split: Split) -> tuple[Tensor, Tensor]:
    (batch,) = data.loader(split, len(split))
    assert not isinstance(batch, dict)
    return batch


def _gradients(splits: list[dict[int, GradientSplit]]) -> dict[str, float]:
    pairs = [share_at_start(one) for one in splits]
    count = len(pairs)
    return {
        "stability_first": splits[0][0].stability,
        "stability_start": sum(start for start, _ in pairs) / count,
        "stability_peak": sum(peak for _, peak in pairs) / count,
        "stability_share": sum(start / peak if peak > 0 else math.nan for start, peak in pairs)
        / count,
    }
