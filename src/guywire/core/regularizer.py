"""The base class of every method: a few hooks, all optional."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from guywire.core.errors import UsageError

__all__ = ["Regularizer", "Step", "Strength", "strength_at"]

Strength = float | Callable[[int], float]


@dataclass
class Step:
    """What a regularizer may know about the optimiser step that is about to happen.

    Attributes:
        optimizer: the ``torch.optim`` optimiser itself, never a wrapper.
        number: optimiser steps done since the wires were attached.
        evaluation: 0 for the first gradient of this step, 1, 2, ... where a closure asks again.
        scale: the AMP scale that still lies on the gradients (fused optimisers unscale inside
            their step); 1.0 otherwise.
        skipped: True if the optimiser will not step because AMP found infinities.
        reshaped: set to True by a regularizer that replaced or reshaped, in ``after_step``,
            parameters of its own making.
    """

    optimizer: torch.optim.Optimizer
    number: int = 0
    evaluation: int = 0
    scale: float = 1.0
    skipped: bool = False
    reshaped: bool = False
    _groups: dict[int, dict[str, Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self._groups:
            self._groups = {id(p): g for g in self.optimizer.param_groups for p in g["params"]}

    def owns(self, parameter: nn.Parameter) -> bool:
        """Tell whether the optimiser updates a parameter.

        Args:
            parameter: a parameter of the model.

        Returns:
            True if it is in one of the optimiser's groups.
        """
        return id(parameter) in self._groups

    def lr(self, parameter: nn.Parameter) -> float:
        """Return the learning rate of a parameter's group.

        Args:
            parameter: a parameter that the optimiser owns.

        Returns:
            The rate now.
        """
        return float(self._groups[id(parameter)]["lr"])


class Regularizer:
    """One way of holding parameters.

    A method is a final class whose constructor only stores keyword arguments under the same names;
    what it learns from data is an attribute with a trailing underscore. All hooks are optional.
    Learnt state survives ``teardown`` and a new ``setup``, so that a loop with a fresh optimiser
    for every task attaches the same objects again.
    """

    slug: ClassVar[str] = ""
    """The paper's slug, empty for methods without one."""
    title: ClassVar[str] = ""
    """The paper's title, or a line that says what the method is."""
    arxiv: ClassVar[str] = ""
    """The paper's arXiv id."""
    place: ClassVar[str] = "step"
    """Where it acts: ``step``, ``weight`` or ``loss``."""
    memory: ClassVar[str] = "0"
    """Extra memory, in multiples of the selected parameters."""
    passes: ClassVar[str] = "0"
    """Extra passes over the data."""
    per_process: ClassVar[bool] = False
    """Whether what was learnt differs between processes (a memory of samples)."""

    def setup(self, model: nn.Module) -> None:
        """Bind to a model: called by ``attach``, each time.

        Args:
            model: the user's module, without wrappers.
        """

    def loss(self, batch: Any, outputs: Any) -> Tensor | None:
        """Return a term for the loss, or ``None``.

        Args:
            batch: the batch.
            outputs: what the model returned for it; ``None`` if the loop did not pass it on.

        Returns:
            A 0-d tensor with a graph, or ``None``.
        """

    def before_step(self, step: Step) -> None:
        """Edit gradients; runs without autograd, after unscaling and after the all-reduce.

        Args:
            step: the step that is about to happen.
        """

    def after_step(self, step: Step) -> None:
        """Edit parameters; runs without autograd.

        Args:
            step: the step that has happened.
        """

    def penalty(self) -> Tensor | None:
        """Return the present value of a step-side term (for logs), or ``None``.

        Returns:
            A 0-d tensor without a graph; under FSDP2 the whole value on every process.
        """

    def consolidate(self, model: nn.Module, data: Iterable[Any] | None) -> None:
        """Learn from a task that ends: new anchors, new importances, a new teacher.

        Args:
            model: the user's module, without wrappers.
            data: batches of the task, or ``None``.
        """

    def teardown(self) -> None:
        """Let go of the model (hooks, references), keep what was learnt; called by ``detach``."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt: a tree of dict, list, number, string, ``None`` and tensor.

        Returns:
            The state.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Args:
            state: the tree.
        """

    def __repr__(self) -> str:
        parts = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if value is not parameter.default and value != parameter.default:
                parts.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


def strength_at(strength: Strength, number: int) -> float:
    """Return a strength at a step: the number itself, or what a schedule says.

    Args:
        strength: a number, or a callable from the number of optimiser steps done to a number.
        number: optimiser steps done.

    Returns:
        The strength, at least 0.

    Raises:
        UsageError: it is negative or not finite.
    """
    value = float(strength(number) if callable(strength) else strength)
    if not 0.0 <= value < float("inf"):
        raise UsageError(f"strength is {value}: it must be a finite number of at least 0")
    return value
