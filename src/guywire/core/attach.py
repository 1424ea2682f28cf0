"""Attach regularizers to a model and its optimiser, by the optimiser's own step hooks.

The pull of a penalty needs no autograd graph, so it is added to the gradients in the optimiser's
step pre-hook: once per optimiser step whatever the gradient accumulation, after AMP unscaling and
after the all-reduce, and on the local shard under FSDP2, without communication.

Two things to know. Gradient clipping by the loop happens before the pull. And the pull is not part
of the reported loss: ``wires.penalty()`` gives its value. Only where the optimiser is given a
closure (LBFGS) the value is added to the loss that the closure returns, since a line search needs
loss and gradient to agree; under FSDP2 that communicates.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import _stepping, batches, selection
from guywire.core.aside import random_state_kept
from guywire.core.errors import AttachError, CheckpointError, GuywireError
from guywire.core.regularizer import Regularizer, Step

__all__ = ["Wires", "attach"]


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizers: Regularizer | Sequence[Regularizer],
) -> Wires:
    """Hold the parameters of a model while an optimiser moves them.

    Args:
        model: the module that is trained: plain, compiled, or wrapped by DDP or FSDP2.
        optimizer: a ``torch.optim`` optimiser, or Accelerate's or Lightning's wrapper of one.
        regularizers: one or several; their order is the order in which they act.

    Returns:
        The wires: ``loss``, ``penalty``, ``consolidate``, ``detach``, ``state_dict``. Also a
        context manager that detaches at its end.

    Raises:
        AttachError: the optimiser is none, holds none of the model's parameters, or a regularizer
            is attached already.
        SelectionError: a regularizer's selection matches nothing.

    Example:
        >>> import guywire as gw
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with gw.attach(model, optimizer, gw.L2(strength=0.5)) as wires:
        ...     loss = model(torch.ones(4, 2)).square().mean() + wires.loss(None)
        ...     loss.backward()
        ...     optimizer.step()
        ...     bool(wires.penalty() > 0)
        True
    """
    if isinstance(regularizers, Regularizer):
        regularizers = [regularizers]
    return Wires(model, optimizer, regularizers)


@contextlib.contextmanager
def _sense(kind: str = "wires") -> Iterator[None]:
    """A saved state comes from a file: what does not fit in it is the file's fault."""
    try:
        yield
    except GuywireError:
        raise
    except (
        KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"the saved state of {kind} makes no sense ({type(error).__name__}: {str(error)[:200]}): "
            "it is damaged, or of another version"
        ) from error


class Wires:
    """Regularizers attached to a model and its optimiser; made by :func:`attach`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        regularizers: Sequence[Regularizer],
    ) -> None:
        self.model = model
        self.regularizers = list(regularizers)
        self.optimizer = _stepping.innermost(optimizer)
        self._inner = selection.unwrap(model)
        _stepping.reshard(self._inner)
        self._check_arguments()
        self.steps = 0
        self._step: Step | None = None
        self._frame: FrameType | None = None
        self._attached: list[Regularizer] = []
        try:
            for regularizer in self.regularizers:
                # Noted first, so that a setup that fails half-way is torn down as well.
                self._attached.append(regularizer)
                regularizer._wires = self  # type: ignore[attr-defined]
                regularizer.setup(self._inner)
        except BaseException:
            self._release()
            raise
        self._known = _stepping.fingerprint(self._inner)
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]

    def __deepcopy__(self, memo: Any) -> Wires:
        # A copy of a model that holds its wires shares them, or it would copy the optimiser and
        # every teacher as well, and fail on a wrapper around the model.
        return self

    def loss(self, batch: Any, outputs: Any = None) -> Tensor:
        """Return the terms that loss-side methods add to the loss of this batch.

        Args:
            batch: the batch, as a pair ``(inputs, labels)`` or a Hugging Face dict.
            outputs: what the model returned for it. Pass it on where you have it: a method that
                needs the outputs and does not get them runs the model once more.

        Returns:
            A 0-d tensor; zero if no method adds anything.
        """
        total: Tensor | None = None
        for regularizer in self.regularizers:
            term = regularizer.loss(batch, outputs)
            if term is not None:
                total = term if total is None else total + term
        if total is None:
            return torch.zeros((), device=batches.device_of(self._inner))
        return total

    def penalty(self) -> Tensor:
        """Return the present value of the step-side penalties, for logs.

        Under FSDP2 this communicates, and every process must call it.

        Returns:
            A 0-d tensor without a graph.
        """
        with torch.no_grad():
            values = [v for r in self.regularizers if (v := r.penalty()) is not None]
            if not values:
                return torch.zeros((), device=batches.device_of(self._inner))
            return torch.stack([v.to(values[0]) for v in values]).sum()

    def consolidate(self, data: Iterable[Any] | None = None) -> None:
        """Tell every regularizer that a task ends.

        The model's train flags and buffers and the global random state are left as they were.

        Args:
            data: batches of the task that ends, for methods that learn from data (EWC's
                importances, a replay memory); others do without. Under DDP and FSDP2 each process
                passes its own part. An iterator is read once and kept if several methods want it.

        Raises:
            AttachError: the wires are detached.
        """
        if not self._handles:
            raise AttachError("these wires are detached: attach again before consolidate()")
        if len(self.regularizers) > 1 and isinstance(data, Iterator):
            data = list(data)
        flags = [(module, module.training) for module in self._inner.modules()]
        try:
            with random_state_kept(batches.device_of(self._inner)):
                for regularizer in self.regularizers:
                    _stepping.reshard(self._inner)
                    regularizer.consolidate(self._inner, data)
        finally:
            for module, flag in flags:
                module.training = flag

    def refresh(self) -> None:
        """Accept a model that was changed on purpose since the wires were attached.

        Every regularizer binds anew: parameters that vanished are let go, new ones are free until
        the next ``consolidate``.

        Raises:
            AttachError: the wires are detached.
        """
        if not self._handles:
            raise AttachError("these wires are detached: attach again instead of refresh()")
        _stepping.reshard(self._inner)
        for regularizer in self.regularizers:
            regularizer.teardown()
            regularizer.setup(self._inner)
        self._known = _stepping.fingerprint(self._inner)

    def detach(self) -> None:
        """Remove the hooks and let go of the model; the regularizers keep what they learnt."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._step = self._frame = None
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on later: a tree for ``core.checkpoint.save``.

        Returns:
            The state of each regularizer in order, and the number of steps done.
        """
        return {
            "steps": self.steps,
            "regularizers": [
                {"kind": type(r).__name__, "state": r.state_dict()} for r in self.regularizers
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Args:
            state: the tree.

        Raises:
            CheckpointError: it belongs to other regularizers, or is no such state.
        """
        if not isinstance(state, dict) or not {"steps", "regularizers"} <= state.keys():
            keys = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise CheckpointError(
                f"a tree with the keys {keys} is not the state of wires: it needs "
                "'steps' and 'regularizers', as wires.state_dict() gives them"
            )
        with _sense():
            kinds = [entry["kind"] for entry in state["regularizers"]]
            steps = int(state["steps"])
        mine = [type(r).__name__ for r in self.regularizers]
        if kinds != mine:
            raise CheckpointError(f"the state is of {kinds}, but attached are {mine}")
        for regularizer, entry in zip(self.regularizers, state["regularizers"], strict=True):
            with _sense(type(regularizer).__name__):
                regularizer.load_state_dict(entry["state"])
        # A method's own parameters may take the shapes that they had when the state was saved.
        self._known = _stepping.fingerprint(self._inner)
        self.steps = steps

    def __enter__(self) -> Wires:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"Wires({', '.join(map(repr, self.regularizers))})"

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        # An optimiser whose step() calls super().step() fires its hooks twice, or not, depending on
        # which classes were used before: only the outermost call counts. Its frame tells it apart
        # from a call that an exception ended without a post-hook.
        caller = None if torch.compiler.is_compiling() else sys._getframe(1)
        if self._frame is not None and caller and _stepping.is_above(self._frame, caller):
            return None
        self._check_model()
        self._frame, self._step = caller, None
        closure, replace = _stepping.find_closure(args, kwargs)
        if closure is None:
            self._step = self._new_step()
            self._edit_gradients(self._step)
            return None
        # A closure computes the gradients inside the step, as often as the optimiser likes: the
        # pull goes in behind each of its backward passes, and its value into the loss it returns.

        def held(*inner: Any, **more: Any) -> Any:
            loss = closure(*inner, **more)
            evaluation = 0 if self._step is None else self._step.evaluation + 1
            self._step = self._new_step(evaluation)
            value = self._coupled_penalty()  # before a decoupled pull moves the parameters
            self._edit_gradients(self._step)
            if loss is None or value is None:
                return loss
            if isinstance(loss, Tensor):
                with torch.no_grad():
                    return loss + value.to(loss)
            return loss + float(value)

        return replace(held)

    def _edit_gradients(self, step: Step) -> None:
        if not step.skipped:
            with torch.no_grad():
                for regularizer in self.regularizers:
                    regularizer.before_step(step)

    def _coupled_penalty(self) -> Tensor | None:
        with torch.no_grad():
            coupled = [r for r in self.regularizers if not getattr(r, "decoupled", False)]
            values = [v for r in coupled if (v := r.penalty()) is not None]
            return torch.stack([v.to(values[0]) for v in values]).sum() if values else None

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # (A compiled step has no frames; there every call counts.)
        if self._frame is not None and sys._getframe(1) is not self._frame:
            return
        step = self._step or self._new_step()
        self._step = self._frame = None
        if not step.skipped:
            with torch.no_grad():
                for regularizer in self.regularizers:
                    regularizer.after_step(step)
            if step.reshaped:
                self._known = _stepping.fingerprint(self._inner)
            self.steps += 1

    def _new_step(self, evaluation: int = 0) -> Step:
        # A fused optimiser under GradScaler divides by the scale inside its step, and skips there.
        scale = getattr(self.optimizer, "grad_scale", None)
        found = getattr(self.optimizer, "found_inf", None)
        return Step(
            self.optimizer,
            number=self.steps,
            evaluation=evaluation,
            scale=1.0 if scale is None else float(scale),
            skipped=(found is not None and bool(found)) or _stepping.only_for_show(self._frame),
        )

    def _check_arguments(self) -> None:
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise AttachError(f"{self.optimizer!r} is not a torch.optim optimiser")
        for regularizer in self.regularizers:
            if not isinstance(regularizer, Regularizer):
                raise AttachError(
                    f"{regularizer!r} is not a Regularizer: pass gw.L2(...), gw.EWC(...) or a list"
                )
            if getattr(regularizer, "_wires", None) is not None:
                raise AttachError(
                    f"{regularizer!r} is attached already: detach those wires first, "
                    "or make another one"
                )
        if len({id(r) for r in self.regularizers}) < len(self.regularizers):
            raise AttachError("one regularizer stands twice in the list: make a second one")
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(p) in owned for p in self._inner.parameters()):
            raise AttachError(
                "the optimiser holds none of the model's parameters: attach the optimiser that "
                "was made from this model (under FSDP2, after fully_shard)"
            )

    def _check_model(self) -> None:
        now = _stepping.fingerprint(self._inner)
        if now == self._known:
            return
        _stepping.reshard(self._inner)
        now = _stepping.fingerprint(self._inner)
        if now == self._known:
            return
        raise AttachError(
            f"{_stepping.change(self._known, now)} since the wires were attached: call "
            "wires.refresh() after changing a model on purpose, or attach again with an optimiser "
            "that has it"
        )

    def _release(self) -> None:
        for regularizer in self._attached:
            regularizer.teardown()
            regularizer._wires = None  # type: ignore[attr-defined]
        self._attached = []
