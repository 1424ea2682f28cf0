"""I-LoRA: a slow adapter that follows the fast one, and holds its hidden states on old samples.

For whoever fine-tunes one model on task after task with LoRA and may keep some old samples. The
adapter that the optimiser moves is *fast*; a *slow* one is its running average, step by step:

    slow_k = decay * slow_{k-1} + (1 - decay) * fast_k          (A and B apart, no gradient)

and from the second task on a batch of old samples goes through both:

    L     = 1/2 (CE(new batch) + CE(memory batch)) + strength * L_MSE
    L_MSE = mean over blocks, tokens and features of (h_fast - h_slow)^2      on the memory batch

h: the output of a block; the slow one is a constant. The slow adapter is the one to use: it averages
``1 / (1 - decay)`` steps, so it forgets later and keeps what the tasks share.

What is *added* to the loop's own CE(new batch) is twice the paper's remainder, as with ``gw.Replay``:

    CE(new) + [ replay * CE(memory) + (1 + replay) * strength * L_MSE ]

which is ``(1 + replay)`` times the paper's L. Adam does not see the factor; under SGD divide the
learning rate by it.

Source: Ren, Li, Wang, Zhao, Qin, "Analyzing and Reducing Catastrophic Forgetting in Parameter
Efficient Tuning", arXiv 2402.18865. Ours: the default decay (the paper's 0.25 a step remembers one
step and a third), the memory filled when a task ends, so that each sample is offered once, dropout
off in both passes over the memory, and that what is trained beside the adapters (a head) is averaged
with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from guywire.core import batches, losses
from guywire.core.aside import aside, random_state_kept
from guywire.core.buffers import BalancedBuffer, Buffer, ReservoirBuffer
from guywire.core.errors import AttachError, DataError, SelectionError, UsageError
from guywire.core.exchange import through
from guywire.core.processes import is_sharded
from guywire.core.regularizer import Regularizer, Step, Strength, strength_at
from guywire.core.selection import named_parameters, unwrap
from guywire.core.tensors import Tensors, place_like
from guywire.methods.adapters import _hidden, averaging
from guywire.methods.adapters._hidden import Consistency, hidden_state_loss
from guywire.methods.adapters._lora import sites
from guywire.methods.adapters._taps import evaluating

__all__ = ["ILoRA"]


@final
class ILoRA(Regularizer):
    """Keep a running average of a LoRA adapter, and hold the adapter to it on old samples.

    The model has its PEFT adapter already (``get_peft_model`` or ``inject_adapter_in_model``); the
    loop trains it, adds ``wires.loss(batch, outputs)`` and ends each task with
    ``wires.consolidate(loader)``, which fills the memory. Use :meth:`slow` to evaluate or save the
    average, or :meth:`fold` to make it the model's own. With several adapters, those that are trained
    count. Under DDP and FSDP2 each process has a memory of its own; under FSDP2 the slow adapter is
    sharded like the fast one, and every process calls ``wires.loss``, ``slow`` and ``fold``.

    Args:
        strength: gamma, the weight of the hidden states' term; a number or a schedule
            ``step -> number``. At 0 this is plain replay, and an average on the side.
        decay: lambda, the weight of the *old* slow value at an update.
        update_every: optimiser steps between updates of the slow adapter.
        warm_up: begin with a plain mean, see :func:`guywire.methods.adapters.averaging.decay_at`.
        consistency: ``mse``, or ``one_sided`` as in the authors' code.
        capacity: samples in the memory.
        batch_size: samples drawn a step; as many as the new batch has if ``None``.
        buffer: ``reservoir``, a uniform sample of all tasks; or ``balanced``, as much of every class.
        replay: weight of the memory's own loss; 0 leaves it out.
        layers: globs over names of the modules whose outputs are held; by default all blocks from
            the first adapted one on. Embeddings are left out: where they are frozen they differ by
            nothing and only dilute the mean.
        sync_at_task_end: set the slow adapter to the fast one at ``consolidate``.
        criterion: ``(logits, labels) -> mean loss`` of the memory; cross entropy if ``None``, shifted
            by one for causal language models of Hugging Face.
        seed: of the memory's choices.

    Raises:
        SelectionError: at attach, if the model has no trainable LoRA factors, or no such ``layers``.
        UsageError: at attach, if a value makes no sense; at ``consolidate`` without data.

    Example:
        >>> import guywire as gw
        >>> net = gw.lora_group(nn.Sequential(nn.Linear(4, 4)), n=1, r=2, target_modules=["0"])
        >>> optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        >>> batch = torch.randn(8, 4), torch.arange(8) % 4
        >>> i_lora = gw.ILoRA(decay=0.9)
        >>> with gw.attach(net, optimizer, i_lora) as wires:
        ...     for task in range(2):
        ...         loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
        ...         (loss + wires.loss(batch)).backward()
        ...         optimizer.step()
        ...         wires.consolidate([batch])
        >>> with i_lora.slow(net):
        ...     averaged = net(batch[0])
        >>> bool((averaged != net(batch[0])).any())
        True
    """

    slug: ClassVar[str] = "i-lora"
    title: ClassVar[str] = (
        "Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning"
    )
    arxiv: ClassVar[str] = "2402.18865"
    place: ClassVar[str] = "loss"
    memory: ClassVar[str] = "1 (of the adapters), and the samples"
    passes: ClassVar[str] = "1 forward and backward and 1 forward a step"
    per_process: ClassVar[bool] = True

    def __init__(
        self,
        strength: Strength = 1.0,
        *,
        decay: float = 0.995,
        update_every: int = 1,
        warm_up: bool = True,
        consistency: Consistency = "mse",
        capacity: int = 500,
        batch_size: int | None = None,
        buffer: Literal["reservoir", "balanced"] = "reservoir",
        replay: float = 1.0,
        layers: Sequence[str] | None = None,
        sync_at_task_end: bool = False,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.strength = strength
        self.decay = decay
        self.update_every = update_every
        self.warm_up = warm_up
        self.consistency: Consistency = consistency
        self.capacity = capacity
        self.batch_size = batch_size
        self.buffer = buffer
        self.replay = replay
        self.layers = layers
        self.sync_at_task_end = sync_at_task_end
        self.criterion = criterion
        self.seed = seed
        self.slow_: Tensors = {}
        self.steps_ = 0
        self.buffer_: Buffer | None = None
        self._updates: dict[str, int] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._model: nn.Module | None = None
        self._fast: dict[str, nn.Parameter] = {}
        self._blocks: dict[str, nn.Module] = {}

    @property
    def horizon(self) -> float:
        """How many optimiser steps the slow adapter averages: ``update_every / (1 - decay)``."""
        return float("inf") if self.decay == 1.0 else self.update_every / (1.0 - self.decay)

    def setup(self, model: nn.Module) -> None:
        """Find the fast adapter; what has no slow value yet gets a copy.

        Args:
            model: the user's module.

        Raises:
            SelectionError: no LoRA factors are trained, or there are no such layers.
            UsageError: a value makes no sense.
        """
        self._check()
        self.buffer_ = self._memory()
        found = sites(model)
        if not any(p.requires_grad for site in found for p in (site.A, site.B)):
            raise SelectionError(
                "the model's LoRA factors are all frozen: activate an adapter (set_adapter), or "
                "load it with is_trainable=True"
            )
        trained = [s for s in found if s.A.requires_grad or s.B.requires_grad]
        self._blocks = _hidden.blocks(model, trained, self.layers)
        every = named_parameters(model)
        slow, updates = {}, {}
        for name, p in every.items():
            old = self.slow_.get(name)
            if old is not None and old.shape == p.shape:
                slow[name] = place_like(old, p)
                updates[name] = self._updates[name]
            elif p.requires_grad:
                slow[name], updates[name] = averaging.slow_copy(p), 0
        self.slow_, self._updates = slow, updates
        self._fast = {name: every[name] for name in slow}
        self._model = model

    def loss(self, batch: Any, outputs: Any) -> Tensor | None:
        """Return the memory's term.

        Args:
            batch: the new batch; its size counts.
            outputs: not used.

        Returns:
            A 0-d tensor; ``None`` in the first task, without autograd, or with both weights at 0.
        """
        if self._model is None or not torch.is_grad_enabled():
            return None
        wires = getattr(self, "_wires", None)
        strength = strength_at(self.strength, 0 if wires is None else wires.steps)
        if strength == 0.0 and self.replay == 0.0:
            return None
        drawn = self._memory().draw(self.batch_size or batches.size_of(batch), self._generator)
        if drawn is None:
            return None
        drawn = batches.to(drawn, batches.device_of(self._model))
        if strength == 0.0:
            with aside():
                outputs = batches.forward(self._model, drawn)
                return self.replay * self._cross_entropy(outputs, drawn)
        # Dropout's noise would be all that two near adapters differ by.
        with aside(), evaluating(self._model):
            return self._both(drawn, strength)

    def after_step(self, step: Step) -> None:
        """Move the slow adapter.

        Args:
            step: the step that has happened.
        """
        self.steps_ += 1
        if self.steps_ % self.update_every:
            return
        alike: dict[float, list[str]] = {}
        for name in self._updates:
            self._updates[name] += 1
            decay = averaging.decay_at(self._updates[name], self.decay, warm_up=self.warm_up)
            alike.setdefault(decay, []).append(name)
        for decay, names in alike.items():
            slow, fast = [self.slow_[n] for n in names], [self._fast[n] for n in names]
            averaging.average_into(slow, fast, decay)

    def consolidate(self, model: nn.Module, data: Iterable[Any] | None) -> None:
        """Offer the task's samples to the memory, once each.

        Args:
            model: not used.
            data: batches of the task that ends.

        Raises:
            UsageError: there is no data.
        """
        if data is None:
            raise UsageError("I-LoRA's memory is filled from data: wires.consolidate(loader)")
        memory = self._memory()
        for batch in data:
            memory.add(batch, self._generator)
        if self.sync_at_task_end:
            for name, p in self._fast.items():
                self.slow_[name] = averaging.slow_copy(p)

    @contextlib.contextmanager
    def slow(self, model: nn.Module | None = None) -> Iterator[nn.Module]:
        """Within, the model has the slow adapter: to evaluate it, or to save it with PEFT.

        Not for training: the fast adapter, which the optimiser knows, is put aside.

        Args:
            model: that was trained; the attached one if ``None``.

        Yields:
            The model.

        Raises:
            AttachError: there is no slow adapter yet, or the model is another one.
        """
        inner = self._that(model)
        with averaging.swapped(inner, self.slow_):
            yield inner if model is None else model

    def fold(self, model: nn.Module | None = None) -> None:
        """Write the slow adapter over the fast one, for good.

        Args:
            model: that was trained; the attached one if ``None``.

        Raises:
            AttachError: there is no slow adapter yet, or the model is another one.
        """
        averaging.copy_into(self._that(model), self.slow_)

    def teardown(self) -> None:
        """Let go of the model; the slow adapter and the memory stay."""
        self._model, self._fast, self._blocks = None, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the slow adapter, the memory and all counts.

        Returns:
            The state.
        """
        return {
            "slow": {name: value.clone() for name, value in self.slow_.items()},
            "updates": dict(self._updates),
            "steps": self.steps_,
            "memory": self._memory().state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Args:
            state: the state.

        Raises:
            CheckpointError: the memory's capacity differs.
        """
        self._memory().load_state_dict(state["memory"])
        self._generator.set_state(state["generator"].cpu())
        self.slow_ = {name: value.clone() for name, value in state["slow"].items()}
        self._updates = {name: int(count) for name, count in state["updates"].items()}
        self.steps_ = int(state["steps"])
        if self._model is not None:
            self.setup(self._model)

    def _both(self, drawn: Any, strength: float) -> Tensor:
        """Run the memory batch through both adapters; the fast states are compared as they come."""
        assert self._model is not None
        model, targets, terms = self._model, [], []

        def compare(name: str, fast: Tensor) -> None:
            known, slow = targets[len(terms)]
            assert known == name, "the two passes ran other blocks"
            mask = _hidden.token_mask(model, name, drawn, fast)
            terms.append(hidden_state_loss(fast, slow, mask, consistency=self.consistency))
            targets[len(terms) - 1] = (name, fast.new_empty(0))

        with (
            torch.no_grad(),
            random_state_kept(batches.device_of(model)),
            averaging.swapped(model, self.slow_),
            _hidden.listen(self._blocks, lambda name, value: targets.append((name, value))),
        ):
            batches.forward(model, drawn)
        with _hidden.listen(self._blocks, compare):
            outputs = batches.forward(model, drawn)
        term = None if self.replay == 0.0 else self.replay * self._cross_entropy(outputs, drawn)
        if not terms:
            raise DataError(f"none of {', '.join(self._blocks)} ran: name other layers=")
        held = (1.0 + self.replay) * strength * torch.stack(terms).mean()
        if is_sharded(model):
            held = through(held, outputs)
        return held if term is None else term + held

    def _cross_entropy(self, outputs: Any, drawn: Any) -> Tensor:
        assert self._model is not None
        logits = batches.logits_of(outputs)
        labels = batches.labels_of(drawn)
        if self.criterion is None:
            return losses.cross_entropy_of(self._model, logits, labels)
        return self.criterion(logits, labels)

    def _that(self, model: nn.Module | None) -> nn.Module:
        if not self.slow_:
            raise AttachError("there is no slow adapter yet: attach and train first")
        if model is None and self._model is None:
            raise AttachError("the wires are detached: name the model, as in i_lora.slow(model)")
        return unwrap(model) if model is not None else self._model  # type: ignore[return-value]

    def _memory(self) -> Buffer:
        if self.buffer_ is None:
            kind = BalancedBuffer if self.buffer == "balanced" else ReservoirBuffer
            self.buffer_ = kind(self.capacity)
        return self.buffer_

    def _check(self) -> None:
        strength_at(self.strength, 0)
        averaging.check_decay(self.decay)
        _hidden.check_consistency(self.consistency)
        if self.update_every < 1:
            raise UsageError(f"update_every={self.update_every} must be at least 1 step")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch_size={self.batch_size} must be at least 1, or None")
        if self.buffer not in ("reservoir", "balanced"):
            raise UsageError(f"buffer={self.buffer!r} is neither 'reservoir' nor 'balanced'")
        if not 0.0 <= self.replay < float("inf"):
            raise UsageError(f"replay={self.replay} must be a finite number of at least 0")
