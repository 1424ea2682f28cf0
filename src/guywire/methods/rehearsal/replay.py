"""Replay: keep a few old samples and learn them again beside every new batch.

The baseline that everyone asks for, and hard to beat where old data may be kept.

    L = L_new + strength * mean over a memory batch of criterion(f(x), y)

The paper's weighting ``w * L_new + (1 - w) * L_memory`` is ``strength = (1 - w) / w`` and a learning
rate times ``w``.

Source: experience replay as in De Lange, van de Ven, Tuytelaars, arXiv 2205.13452 (class-balanced,
refilled at task ends, memory batches as large as new ones); Chaudhry et al., "On Tiny Episodic
Memories in Continual Learning", arXiv 1902.10486 (reservoir).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from guywire.core import batches, losses
from guywire.core.aside import aside
from guywire.core.buffers import BalancedBuffer, Buffer, ReservoirBuffer
from guywire.core.errors import UsageError
from guywire.core.regularizer import Regularizer, Strength, strength_at

__all__ = ["Criterion", "Replay"]

Criterion = Callable[[Tensor, Tensor], Tensor]


@final
class Replay(Regularizer):
    """Add the loss on samples from a memory to the loss of every batch.

    Add ``wires.loss(batch, outputs)`` to the loss. A memory batch is drawn before the new batch
    enters the memory. Under ``torch.no_grad`` (validation) nothing is drawn or kept. Each process
    of DDP has a memory of its own.

    Args:
        capacity: samples in the memory.
        batch_size: samples drawn a step; as many as the new batch has if ``None``.
        strength: weight of the memory's loss; a number or a schedule ``step -> number``. At 0 the
            memory fills but nothing is drawn.
        buffer: ``"reservoir"``, a uniform sample of the stream that fills at every step; or
            ``"balanced"``, as much of every class, filled at ``consolidate(data)`` and drawn
            uniformly over classes.
        criterion: ``(logits, labels) -> mean loss``; cross entropy if ``None``,
            shifted by one for causal language models of Hugging Face, as in their own loss.
        seed: of the choice.

    Raises:
        UsageError: at attach, if an argument makes no sense; at ``consolidate`` without data, if
            the memory is balanced.

    Example:
        >>> import guywire as gw
        >>> model = nn.Linear(3, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> replay = gw.Replay(capacity=5)
        >>> wires = gw.attach(model, optimizer, replay)
        >>> batch = torch.randn(8, 3), torch.arange(8) % 4
        >>> float(wires.loss(batch, model(batch[0])))  # nothing to draw yet
        0.0
        >>> len(replay.buffer_), bool(wires.loss(batch, model(batch[0])) > 0)
        (5, True)
    """

    slug: ClassVar[str] = "stability-gap"
    title: ClassVar[str] = "Experience replay"
    arxiv: ClassVar[str] = "1902.10486"
    place: ClassVar[str] = "loss"
    memory: ClassVar[str] = "0, and the samples"
    passes: ClassVar[str] = "1 forward and backward a step"
    per_process: ClassVar[bool] = True

    def __init__(
        self,
        capacity: int = 500,
        *,
        batch_size: int | None = None,
        strength: Strength = 1.0,
        buffer: Literal["reservoir", "balanced"] = "reservoir",
        criterion: Criterion | None = None,
        seed: int = 0,
    ) -> None:
        self.capacity = capacity
        self.batch_size = batch_size
        self.strength = strength
        self.buffer = buffer
        self.criterion = criterion
        self.seed = seed
        self.buffer_: Buffer | None = None
        self._generator = torch.Generator().manual_seed(seed)
        self._model: nn.Module | None = None

    def setup(self, model: nn.Module) -> None:
        """Bind to the model; the first time, make the memory.

        Args:
            model: the user's module.

        Raises:
            UsageError: an argument makes no sense.
        """
        strength_at(self.strength, 0)
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch_size={self.batch_size} must be at least 1, or None")
        self.buffer_ = self._memory()
        self._model = model

    def loss(self, batch: Any, outputs: Any) -> Tensor | None:
        """Return the loss on a memory batch, then let a reservoir take in the new one.

        Args:
            batch: the new batch.
            outputs: not used.

        Returns:
            A 0-d tensor, or ``None`` while the memory is empty, at strength 0, or without autograd.
        """
        if self._model is None or not torch.is_grad_enabled():
            return None
        wires = getattr(self, "_wires", None)
        strength = strength_at(self.strength, 0 if wires is None else wires.steps)
        memory = self._memory()
        drawn = None
        if strength > 0.0:
            count = self.batch_size or batches.size_of(batch)
            drawn = memory.draw(count, self._generator)
        if self.buffer == "reservoir":
            memory.add(batch, self._generator)
        if drawn is None:
            return None
        drawn = batches.to(drawn, batches.device_of(self._model))
        with aside():
            logits = batches.logits_of(batches.forward(self._model, drawn))
        labels = batches.labels_of(drawn)
        if self.criterion is None:
            return strength * losses.cross_entropy_of(self._model, logits, labels)
        return strength * self.criterion(logits, labels)

    def consolidate(self, model: nn.Module, data: Iterable[Any] | None) -> None:
        """Fill a balanced memory from the task that ends; a reservoir has seen it already.

        Args:
            model: not used.
            data: batches of the task.

        Raises:
            UsageError: the memory is balanced and there is no data.
        """
        if self.buffer != "balanced":
            return
        if data is None:
            raise UsageError("a balanced memory is filled from data: wires.consolidate(loader)")
        memory = self._memory()
        for batch in data:
            memory.add(batch, self._generator)

    def teardown(self) -> None:
        """Let go of the model; the memory stays."""
        self._model = None

    def state_dict(self) -> dict[str, Any]:
        """Return the memory and the generator's state.

        Returns:
            The state.
        """
        return {"memory": self._memory().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Args:
            state: the state.

        Raises:
            CheckpointError: the capacity differs.
        """
        self._memory().load_state_dict(state["memory"])
        self._generator.set_state(state["generator"].cpu())

    def _memory(self) -> Buffer:
        if self.buffer_ is None:
            if self.buffer not in ("reservoir", "balanced"):
                raise UsageError(f"buffer={self.buffer!r} is neither 'reservoir' nor 'balanced'")
            kind = ReservoirBuffer if self.buffer == "reservoir" else BalancedBuffer
            self.buffer_ = kind(self.capacity)
        return self.buffer_
