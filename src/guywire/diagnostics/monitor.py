"""Evaluate all seen tasks while a model trains, without the training noticing.

For whoever wants to know how deep a model falls after a task switch, not only where it stands at
the end. The monitor is a passive observer of any loop: it restores train flags and buffers, draws
nothing from the global random state, and evaluates a subset that is chosen once. (An evaluation
subset that is redrawn every time, as in the paper's own code, adds sampling noise to the curve;
minima and largest drops then grow with the length of the run.)

Source: De Lange, van de Ven, Tuytelaars, arXiv 2205.13452.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Any, NamedTuple, final

import torch
from torch import nn

from guywire.core.aside import undisturbed
from guywire.core.errors import CheckpointError, UsageError
from guywire.core.selection import unwrap
from guywire.diagnostics._evaluation import EvaluationSets, Forward, Score
from guywire.diagnostics._schedule import Budget, Every
from guywire.diagnostics.tracker import StabilityTracker

__all__ = ["ContinualMonitor", "Observation"]


class Observation(NamedTuple):
    """One point of a curve.

    Attributes:
        step: updates done in the whole stream.
        task: the task being learned.
        evaluated: the task evaluated.
        value: its score.
    """

    step: int
    task: str
    evaluated: str
    value: float


@final
class ContinualMonitor:
    """Watch the accuracy on every seen task, update by update.

    Either ``attach(model, optimizer)`` once per optimiser, and every optimiser step counts as an
    update; or call ``step(model)`` after each one. Tell it when tasks begin and end. It evaluates
    before update 0, when it is due, and always after the last update of a task.

    A loss that AMP's GradScaler skips is no update. Under DDP and FSDP2 every process evaluates the
    same sets (call it on all of them).

    Args:
        evals: task names to held-out data: a pair of tensors ``(inputs, labels)``, a Hugging Face
            dict, or an iterable of either.
        every: evaluate whenever the number of updates is a multiple of this.
        subset: samples of each task to keep, chosen once; ``None`` for all. Accuracies then have a
            binomial standard error, see :meth:`standard_error`.
        seed: of the choice.
        budget: instead of ``every``: the share of the training time that evaluations may take, e.g.
            0.1. They are dense after a switch and sparser later. The schedule counts updates, not
            seconds, so it needs ``train_batch_size``; :meth:`cost` tells what was measured.
        train_batch_size: samples in an update, for the budget.
        dense: with a budget: updates after a switch at which every one is evaluated.
        growth: with a budget: how fast evaluations thin out after that.
        windows: of windowed forgetting and plasticity, in evaluations.
        beta: of LCA.
        score: ``"accuracy"``; ``"negative_loss"`` (for language models); or a callable
            ``(logits, labels) -> [batch]``.
        classes: task names to the columns that a prediction may take (task-incremental).
        forward: ``(model, batch) -> outputs``, e.g. to normalise images; by default the model is
            called on the inputs.
        batch_size: samples in one forward pass, at most. Tasks of equal shape share passes.

    Raises:
        UsageError: an argument makes no sense.
        DataError: an evaluation set is empty or no batch.

    Example:
        >>> x, y = torch.randn(64, 5), torch.arange(64) % 2
        >>> model = nn.Linear(5, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = ContinualMonitor({"a": (x, y), "b": (-x, y)})
        >>> with monitor.attach(model, optimizer):
        ...     for task, sign in ("a", 1), ("b", -1):
        ...         monitor.begin_task(task)
        ...         for _ in range(3):
        ...             optimizer.zero_grad()
        ...             nn.functional.cross_entropy(model(sign * x), y).backward()
        ...             optimizer.step()
        ...         monitor.end_task()
        >>> sorted(monitor.metrics())[:4]
        ['average_accuracy', 'forgetting', 'lca10', 'min_acc']
        >>> [(row.step, row.evaluated) for row in monitor.curves() if row.task == "b"][:3]
        [(3, 'b'), (4, 'a'), (4, 'b')]
    """

    def __init__(
        self,
        evals: Mapping[str, Any],
        every: int = 1,
        *,
        subset: int | None = 1000,
        seed: int = 0,
        budget: float | None = None,
        train_batch_size: int | None = None,
        dense: int = 50,
        growth: float = 1.25,
        windows: Sequence[int] = (10, 100),
        beta: int = 10,
        score: Score = "accuracy",
        classes: Mapping[str, Sequence[int]] | None = None,
        forward: Forward | None = None,
        batch_size: int = 1024,
    ) -> None:
        if budget is not None and (train_batch_size is None or train_batch_size < 1):
            raise UsageError(
                f"budget={budget} needs train_batch_size (at least 1, not {train_batch_size}), "
                "from which the cost of an evaluation follows"
            )
        if batch_size < 1:
            raise UsageError(f"batch_size={batch_size} must be at least 1")
        self.every = every
        self.budget = budget
        self.train_batch_size = train_batch_size
        self._sets = EvaluationSets(
            evals,
            subset=subset,
            seed=seed,
            score=score,
            classes=classes,
            forward=forward,
            batch_size=batch_size,
        )
        self._schedule = Every(every) if budget is None else Budget(budget, dense, growth)
        self._tracker = StabilityTracker(windows, beta)
        self.updates = 0
        self._latest = -1
        self._rows: list[tuple[int, int, int, float]] = []
        self._names = list(evals)
        self._model: nn.Module | None = None
        self._handle: Any = None
        self._evaluations = 0
        self._seconds = 0.0
        self._elapsed = 0.0
        self._resumed: float | None = None

    @property
    def task(self) -> str | None:
        """The task being learned, or ``None`` between tasks."""
        return self._tracker.current

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> ContinualMonitor:
        """Count every step of an optimiser as an update of this model.

        Attach again where a loop makes a new optimiser; the count goes on.

        Args:
            model: the module that is trained, or a wrapper of it.
            optimizer: a ``torch.optim`` optimiser, or Accelerate's wrapper of one.

        Returns:
            The monitor, which as a context manager detaches at its end.

        Raises:
            UsageError: it is not an optimiser.
        """
        self.detach()
        inner = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(inner, torch.optim.Optimizer):
            raise UsageError(f"{optimizer!r} is not a torch.optim optimiser")
        self._model = model
        self._handle = inner.register_step_post_hook(self._after_step)
        return self

    def detach(self) -> None:
        """Remove the hook and let go of the model; curves and metrics stay."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._model = None

    def begin_task(self, name: str, model: nn.Module | None = None) -> None:
        """Say that a task begins; the first time, evaluate before its first update.

        Args:
            name: of the task, among ``evals``.
            model: the model; not needed when attached.

        Raises:
            UsageError: there is no such evaluation set, another task has not ended, or no model.
        """
        if name not in self._sets.sizes:
            raise UsageError(
                f"no evaluation set for task {name!r}: the sets are {', '.join(self._names)}"
            )
        model = self._get(model)
        seen = name in self._tracker.order
        self._tracker.begin_task(name)
        self._resumed = time.perf_counter()
        self._schedule.begin(self.updates)
        if not seen or self._latest < self.updates:
            # Old tasks were evaluated when the last one ended, at this same update.
            self._evaluate(model, [name] if self._latest == self.updates else None)

    def step(self, model: nn.Module | None = None) -> None:
        """Count an update, and evaluate if it is due.

        Args:
            model: the model; not needed when attached (then the optimiser's hook calls this).

        Raises:
            UsageError: no task has begun, or there is no model.
        """
        if self._tracker.current is None:
            raise UsageError("an update outside any task: call begin_task(name) before it")
        model = self._get(model)
        self._tick()
        self.updates += 1
        if self._schedule.due(self.updates, self._price()):
            self._evaluate(model)

    def end_task(self, model: nn.Module | None = None) -> None:
        """Say that the current task ended; evaluate unless its last update was evaluated.

        Args:
            model: the model; not needed when attached.

        Raises:
            UsageError: no task has begun, or there is no model.
        """
        if self._tracker.current is None:
            raise UsageError("no task to end: call begin_task(name) first")
        if self._latest < self.updates:
            self._evaluate(self._get(model))
        self._tick()
        self._resumed = None
        self._tracker.end_task()

    def metrics(self) -> dict[str, float]:
        """Return the stability metrics now.

        Returns:
            ``min_acc``, ``wc_acc``, ``wf10``, ``wp10``, ``wf100``, ``wp100``, ``average_accuracy``,
            ``forgetting``, ``lca10`` (for the default windows and beta), in units of the score.
            NaN where undefined: ``min_acc`` and ``forgetting`` of a single task.
        """
        return self._tracker.metrics()

    def curves(self) -> list[Observation]:
        """Return every evaluation so far, in order of time.

        Returns:
            Rows ``(step, task, evaluated, value)``.
        """
        return [
            Observation(step, self._names[task], self._names[evaluated], value)
            for step, task, evaluated, value in self._rows
        ]

    def standard_error(self, name: str, accuracy: float) -> float:
        """Return the binomial standard error of an accuracy on a task's evaluation set.

        Args:
            name: of the task.
            accuracy: a fraction.

        Returns:
            ``sqrt(a (1 - a) / n)``.
        """
        return (accuracy * (1.0 - accuracy) / self._sets.sizes[name]) ** 0.5

    def cost(self) -> dict[str, float]:
        """Return what watching cost in this process, and the resolution that it bought.

        Returns:
            ``evaluations`` (times at which some task was evaluated), ``seconds`` spent on them,
            ``share`` of the time between the begin and the end of tasks, ``mean_gap`` and
            ``max_gap`` between evaluations, in updates.
        """
        self._tick()
        steps = sorted({row[0] for row in self._rows})
        gaps = [b - a for a, b in pairwise(steps)]
        return {
            "evaluations": float(self._evaluations),
            "seconds": self._seconds,
            "share": self._seconds / self._elapsed if self._elapsed > 0 else 0.0,
            "mean_gap": sum(gaps) / len(gaps) if gaps else 0.0,
            "max_gap": float(max(gaps, default=0)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on with identical curves: no data, and no timings.

        Returns:
            A tree for ``core.checkpoint.save``.
        """
        numbers = [row[:3] for row in self._rows]
        return {
            "names": list(self._names),
            "sizes": [self._sets.sizes[name] for name in self._names],
            "every": self.every,
            "budget": self.budget,
            "updates": self.updates,
            "latest": self._latest,
            "rows": torch.tensor(numbers, dtype=torch.int64).reshape(-1, 3),
            "values": torch.tensor([row[3] for row in self._rows], dtype=torch.float64),
            "schedule": self._schedule.state_dict(),
            "tracker": self._tracker.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave, in a monitor made with the same arguments.

        Args:
            state: the tree.

        Raises:
            CheckpointError: the evaluation sets or the schedule differ.
        """
        mine = (self._names, [self._sets.sizes[n] for n in self._names], self.every, self.budget)
        theirs = (state["names"], state["sizes"], state["every"], state["budget"])
        if mine != theirs:
            raise CheckpointError(
                f"the saved curves are of tasks {theirs[0]} with {theirs[1]} samples, "
                f"every={theirs[2]}, budget={theirs[3]}; this monitor has {mine[0]} with {mine[1]}, "
                f"every={mine[2]}, budget={mine[3]}: make it with the same arguments"
            )
        self._tracker.load_state_dict(state["tracker"])
        self._schedule.load_state_dict(state["schedule"])
        self.updates, self._latest = int(state["updates"]), int(state["latest"])
        self._rows = [
            (*row, value)
            for row, value in zip(state["rows"].tolist(), state["values"].tolist(), strict=True)
        ]
        self._resumed = None if self.task is None else time.perf_counter()

    def __enter__(self) -> ContinualMonitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        found = getattr(optimizer, "found_inf", None)  # a fused optimiser skips inside its step
        if found is None or not bool(found):
            self.step()

    def _get(self, model: nn.Module | None) -> nn.Module:
        model = self._model if model is None else model
        if model is None:
            raise UsageError("no model to evaluate: pass it, or attach(model, optimizer)")
        return model

    def _evaluate(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        begun = time.perf_counter()
        chosen = list(self._tracker.order if names is None else names)
        inner = unwrap(model)
        with undisturbed(inner, mode=False), torch.no_grad():
            values = self._sets.evaluate(inner, chosen)
        self._tracker.update(self.updates, values)
        task = self._names.index(self._tracker.current or self._tracker.order[-1])
        for name, value in values.items():
            self._rows.append((self.updates, task, self._names.index(name), value))
        self._latest = self.updates
        self._evaluations += 1
        self._seconds += time.perf_counter() - begun

    def _price(self) -> float:
        if self.train_batch_size is None:
            return 0.0
        samples = sum(self._sets.sizes[name] for name in self._tracker.order)
        return samples / (3.0 * self.train_batch_size)

    def _tick(self) -> None:
        if self._resumed is not None:
            now = time.perf_counter()
            self._elapsed += now - self._resumed
            self._resumed = now
