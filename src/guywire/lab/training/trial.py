"""One trial: one method, one seed, all tasks of a stream; stopped at any moment, it goes on.

A trial is a pure function of its spec. What it needs to go on (weights, optimiser, what the
regularizers learnt, random states, curves, the position within the epoch's permutation) lies in one
file that is replaced atomically, so a kill at any moment costs time and changes nothing else.
"""

from __future__ import annotations

import hashlib
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import guywire
from guywire.core import batches, checkpoint, writing
from guywire.core.attach import Wires
from guywire.core.errors import CheckpointError, NonFiniteError
from guywire.lab import models, streams
from guywire.lab.streams import Split, Stream
from guywire.lab.training import adapters, arms, evaluate, optimizers
from guywire.lab.training.config import TrialSpec
from guywire.lab.training.criterion import Criterion
from guywire.lab.training.record import (
    Position,
    Record,
    bytes_in,
    check_data,
    finished,
    result_of,
    split_bytes,
)
from guywire.lab.training.seeding import deterministic, generator, seed_of

__all__ = ["Trial", "run_trial"]

_STATE = "state.safetensors"
_PROGRESS_SECONDS = 0.5


def run_trial(
    spec: TrialSpec, directory: Path, resume: bool = False, stream: Stream | None = None
) -> dict[str, Any]:
    """Train and evaluate one method with one seed.

    Args:
        spec: all that the trial depends on.
        directory: its folder: ``state.safetensors``, ``progress.json``, ``metrics.parquet`` and,
            at the end, ``result.json``.
        resume: go on from the state in the folder, if there is one; a finished trial is read. If
            what it left is damaged, it is written again from the state.
        stream: what ``spec.stream`` describes, prepared for the model, if it is loaded already.

    Returns:
        The content of ``result.json``.

    Raises:
        NonFiniteError: the loss became NaN or infinite; the last good state is kept.
        CheckpointError: the state is damaged or of another trial, or a file cannot be written.
        DataError: the data cannot be read, or a task has no samples.
        UsageError: the spec makes no sense.

    Example:
        >>> import tempfile
        >>> spec = TrialSpec(epochs=1, evaluation={"enabled": False})
        >>> result = run_trial(spec, Path(tempfile.mkdtemp()) / spec.id)
        >>> len(result["accuracy_matrix"]), result["steps"] > 0
        (5, True)
    """
    directory.mkdir(parents=True, exist_ok=True)
    known = finished(directory) if resume else None
    if known is not None:
        return known
    for leftover in directory.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    if stream is None:
        stream = models.prepare(spec.model, streams.load(spec.stream))
    with deterministic(spec.threads), torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed_of(spec.run_seed, spec.dice, "dropout"))
        trial = Trial(spec, directory, stream)
        if resume and (directory / _STATE).is_file():
            trial.restore(checkpoint.load(directory / _STATE))
        return trial.run()


class Trial:
    """The state of one trial and its loop.

    Args:
        spec: all that it depends on.
        directory: where its files go; must exist.
        stream: prepared for the model.
    """

    def __init__(self, spec: TrialSpec, directory: Path, stream: Stream) -> None:
        if spec.sweep is not None:
            stream = evaluate.on_validation(stream)
        self.spec = spec
        self.directory = directory
        self.stream = stream
        self.model = models.build(spec.model, stream, self._generator("init"))
        self.criterion = Criterion(stream, spec.loss)
        self.arm = arms.build(spec, self.criterion)
        if self.arm.lora is not None:
            adapters.inject(self.model.backbone, self._generator("adapters"), self.arm.lora)
        self.criterion.suit(joint=self.arm.joint, distilled=arms.distils_by_sigmoid(self.arm))
        self.steps = [
            spec.epochs * math.ceil(len(self._train_split(t)) / spec.batch_size)
            for t in range(len(stream.tasks))
        ]
        check_data(stream)
        self.position = Position()
        self.record = Record()
        self.optimizer: torch.optim.Optimizer | None = None
        self.wires: Wires | None = None
        self._grow(0)
        self.monitor = evaluate.monitor(
            self.model,
            stream,
            spec.evaluation,
            steps=self.steps,
            batch_size=spec.batch_size,
            seed_parts=(spec.run_seed, spec.seed),
        )
        self._begun = False
        self._watched_before = 0.0
        self._saved_at = self._shown_at = self._since = time.perf_counter()

    def run(self) -> dict[str, Any]:
        """Train on the tasks that are left, and write the results.

        Returns:
            The content of ``result.json``.
        """
        tasks = len(self.stream.tasks)
        trained = self.position.task < tasks
        try:
            while self.position.task < tasks:
                task = self.position.task
                if not self._begun:
                    self._begin(task)
                    self.save()
                self._train(task)
                self._end(task)
            if trained:
                self.save()
        finally:
            self._let_go()
        return self._write_results()

    def save(self) -> None:
        """Write everything needed to go on.

        Raises:
            NonFiniteError: a weight is NaN or infinite: such a state would be no good one.
            CheckpointError: the file cannot be written.
        """
        self._clock()
        self._check_finite()
        p, r = self.position, self.record
        checkpoint.save(
            self.directory / _STATE,
            {
                "spec": _identity(self.spec),
                "position": [p.task, p.epoch, p.batch, p.step],
                "begun": self._begun,
                "model": self.model.state_dict(),
                "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
                "wires": None if self.wires is None else self.wires.state_dict(),
                "random": torch.random.default_generator.get_state(),
                "monitor": None if self.monitor is None else self.monitor.state_dict(),
                "losses": torch.tensor(r.losses, dtype=torch.float64),
                "loss_tasks": torch.tensor(r.loss_tasks, dtype=torch.int32),
                "matrix": r.matrix,
                "pooled": r.pooled,
                "extra_memory": r.extra_memory,
                "seconds": r.seconds,
                "evaluation_seconds": r.evaluation_seconds,
            },
        )
        self._saved_at = self._since = time.perf_counter()

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what ``save`` wrote.

        Args:
            state: the tree.

        Raises:
            CheckpointError: it is of another trial.
        """
        if state.get("spec") != _identity(self.spec):
            raise CheckpointError(
                f"{self.directory / _STATE} is of a trial with other settings: "
                "resume with the run's own config.toml, or choose another folder"
            )
        self.position = Position(*state["position"])
        for task in range(1, min(self.position.task, len(self.stream.tasks) - 1) + 1):
            self._grow(task)
        if state["begun"]:
            self._attach(self.position.task)
        self.model.load_state_dict(state["model"])
        if self.optimizer is not None and self.wires is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.wires.load_state_dict(state["wires"])
            # What one method freezes decides what the next one binds to, as at the first attach.
            self.wires.refresh()
        if self.monitor is not None:
            self.monitor.load_state_dict(state["monitor"])
        self._begun = state["begun"]
        self.record = Record(
            losses=state["losses"].tolist(),
            loss_tasks=state["loss_tasks"].tolist(),
            matrix=state["matrix"],
            pooled=state["pooled"],
            extra_memory=state["extra_memory"],
            seconds=state["seconds"],
            evaluation_seconds=state["evaluation_seconds"],
        )
        torch.random.default_generator.set_state(state["random"])
        self._since = time.perf_counter()

    def _begin(self, task: int) -> None:
        if task > 0:
            self._grow(task)
        self._attach(task)
        self._begun = True
        if self.monitor is not None:
            self.monitor.begin_task(str(task), self.model)

    def _grow(self, task: int) -> None:
        new = [c for c in self.stream.tasks[task].classes if c >= self.model.classes]
        if new:
            self.model.grow(len(new), self._generator("head", task))

    def _attach(self, task: int) -> None:
        if self.arm.frozen and (task > 0 or optimizers.is_pretrained(self.spec.model)):
            self.model.backbone.requires_grad_(False)
        self._train_mode()
        self.criterion.begin(task)
        rate = None if self.arm.lora is None else self.arm.lora["lr"]
        self.optimizer = optimizers.make(self.spec, self.model, lr=rate)
        self.wires = guywire.attach(self.model, self.optimizer, self.arm.regularizers)

    def _let_go(self) -> None:
        if self.wires is not None:
            self.wires.detach()
        self.optimizer = self.wires = None

    def _train_mode(self) -> None:
        self.model.train()
        if not all(p.requires_grad for p in self.model.backbone.parameters()):
            self.model.backbone.eval()  # a frozen backbone keeps its running statistics, too

    def _train(self, task: int) -> None:
        split = self._train_split(task)
        p = self.position
        while p.epoch < self.spec.epochs:
            order = self._generator("order", task, p.epoch)
            found = self.stream.batches(split, self.spec.batch_size, order)
            for batch in islice(found, p.batch, None):
                self._step(batch, task)
                p.batch += 1
                self._after_step()
            p.epoch, p.batch = p.epoch + 1, 0

    def _step(self, batch: Any, task: int) -> None:
        assert self.optimizer is not None
        assert self.wires is not None
        batch = batches.to(batch, batches.device_of(self.model))
        self.optimizer.zero_grad()
        outputs = batches.forward(self.model, batch)
        loss = self.criterion(outputs, batch) + self.wires.loss(batch, outputs)
        value = float(loss.detach())
        if not math.isfinite(value):
            p = self.position
            raise NonFiniteError(
                f"{self.spec.id}: the loss is {value} at step {p.step + 1} (task {task}, epoch "
                f"{p.epoch}): {_REMEDY}; the last good state is in {self.directory / _STATE}"
            )
        loss.backward()
        self.optimizer.step()
        self.record.losses.append(value)
        self.record.loss_tasks.append(task)
        self.position.step += 1
        if self.monitor is not None:
            with self.arm.in_use(self.model):
                self.monitor.step(self.model)

    def _after_step(self) -> None:
        now = time.perf_counter()
        every = self.spec.checkpoint.steps
        due = every is not None and self.position.step % every == 0
        if due or now - self._saved_at > self.spec.checkpoint.seconds:
            self.save()
        if now - self._shown_at > _PROGRESS_SECONDS:
            self._show()

    def _end(self, task: int) -> None:
        assert self.wires is not None
        loader = self.stream.loader(self.stream.tasks[task].train, self.spec.batch_size)
        self._check_finite()
        try:
            with evaluate.task_given(self.model, self.stream, task):
                self.wires.consolidate(loader)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{self.spec.id}: at the end of task {task}, after step {self.position.step}: {error}; "
                f"{_REMEDY}; the last good state is in {self.directory / _STATE}"
            ) from error
        self.record.extra_memory = max(self.record.extra_memory, self._extra_memory(task))
        self._clock()
        with self.arm.in_use(self.model):
            if self.monitor is not None:
                self.monitor.end_task(self.model)
            self._clock()
            row, pooled = evaluate.matrix_row(self.model, self.stream, task)
        self.record.matrix.append(row)
        self.record.pooled = pooled
        self._let_go()
        self._since = time.perf_counter()
        p = self.position
        p.task, p.epoch, p.batch = task + 1, 0, 0
        self._begun = False
        self._show()

    def _train_split(self, task: int) -> Split:
        own = self.stream.tasks[task].train
        if not self.arm.joint or task == 0:
            return own
        return self.stream.tasks[0].train.concat(t.train for t in self.stream.tasks[1 : task + 1])

    def _extra_memory(self, task: int) -> int:
        assert self.wires is not None
        held = bytes_in(self.wires.state_dict())
        if self.arm.joint:  # what it keeps is the data of the past
            held += sum(split_bytes(t.train) for t in self.stream.tasks[:task])
        return held

    def _generator(self, *purpose: str | int) -> torch.Generator:
        # The first values and the order of samples are the same for every method of one seed, so
        # that methods are compared pair by pair; what a method draws itself has its own seed.
        return generator(self.spec.run_seed, self.spec.seed, *purpose)

    def _check_finite(self) -> None:
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"{self.spec.id}: {name!r} is NaN or infinite after step {self.position.step}: "
                    f"{_REMEDY}; the last good state is in {self.directory / _STATE}"
                )

    def _clock(self) -> None:
        """Book the time since the last booking: on training, or on looking."""
        now = time.perf_counter()
        watched = 0.0 if self.monitor is None else self.monitor.cost()["seconds"]
        looked = watched - self._watched_before
        self._watched_before = watched
        self.record.evaluation_seconds += looked
        self.record.seconds += max(0.0, now - self._since - looked)
        self._since = now

    def _show(self) -> None:
        p = self.position
        writing.write_json(
            self.directory / "progress.json",
            {"step": p.step, "total": sum(self.steps), "task": p.task, "epoch": p.epoch},
            durable=False,
        )
        self._shown_at = time.perf_counter()

    def _write_results(self) -> dict[str, Any]:
        columns = self.record.curves(self.monitor)
        writing.write_parquet(self.directory / "metrics.parquet", columns)
        result = result_of(
            self.spec, self.model, self.stream, self.position.step, self.record, self.monitor
        )
        writing.write_json(self.directory / "result.json", result)
        return result


_REMEDY = "lower --lr or the method's strength"


def _identity(spec: TrialSpec) -> str:
    """What must be the same for a state to fit: everything but when states are saved."""
    left_out = {"checkpoint"} if spec.sweep is not None else {"checkpoint", "sweep"}
    return hashlib.sha256(spec.model_dump_json(exclude=left_out).encode()).hexdigest()
