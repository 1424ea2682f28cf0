"""EWC: hold parameters by a quadratic weighted with the Fisher information of past tasks.

For whoever trains on task after task without the old data, and can spend one more pass over each
task's data at its end: weights that the old tasks depend on are held hard, the others stay free.

    penalty = strength * sum_t sum_i F_t,i (theta_i - theta_t,i)^2

theta_t: the parameters when task t ended; F_t: the diagonal Fisher information there, the mean over
samples of squared *per-sample* gradients of -log p(y|x). The sum over tasks is one quadratic with
precision P = sum_t F_t and mean m = sum_t F_t theta_t / P, up to a constant, so memory and cost do
not grow with the number of tasks. With ``decay`` it is online EWC instead: P = decay * P + F_t,
anchored at the latest parameters.

A Fisher diagonal of per-sample gradients is small (1e-8 to 1e-2): useful strengths lie decades
above those of L2. ``normalise="mean"`` scales it to mean 1, which makes strengths transferable.

Source: Kirkpatrick et al., arXiv 1612.00796 (eq. 3); online form: Schwarz et al., arXiv 1805.06370;
as compared in Smith et al., arXiv 2203.17269. None of the formulas here has a factor 1/2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from guywire.core import tensors
from guywire.core.errors import CheckpointError, NonFiniteError, UsageError
from guywire.core.regularizer import Regularizer, Step
from guywire.core.selection import Selection
from guywire.core.shelf import Item, Keep, Shelf
from guywire.core.tensors import Tensors
from guywire.curvature import diagonal_fisher
from guywire.methods.penalties import _anchored

__all__ = ["EWC", "collapse", "ewc_penalty"]


def ewc_penalty(
    params: Mapping[str, Tensor], anchors: Mapping[str, Tensor], importances: Mapping[str, Tensor]
) -> Tensor:
    """Return ``sum importance * (theta - anchor)^2`` over all tensors, differentiable.

    Args:
        params: names to parameters.
        anchors: names to anchors of the same shapes.
        importances: names to diagonal Fisher information of the same shapes.

    Returns:
        A 0-d tensor.

    Example:
        >>> w, a, f = torch.tensor([1.0, 2.0]), torch.zeros(2), torch.tensor([1.0, 10.0])
        >>> ewc_penalty({"w": w}, {"w": a}, {"w": f})
        tensor(41.)
    """
    terms = [(importances[n] * (p - anchors[n]).square()).sum() for n, p in params.items()]
    return torch.stack(terms).sum()


def collapse(
    precision: Tensor, mean: Tensor, importance: Tensor, anchor: Tensor
) -> tuple[Tensor, Tensor]:
    """Add one quadratic to another: the sum is a quadratic again, up to a constant.

    ``P (theta - m)^2 + F (theta - a)^2 = (P + F) (theta - m')^2 + const`` with
    ``m' = (P m + F a) / (P + F)``; where both weights are zero the mean is the new anchor.

    Args:
        precision: P, any shape.
        mean: m, the same shape.
        importance: F, the same shape.
        anchor: a, the same shape.

    Returns:
        ``P + F`` and ``m'``.

    Example:
        >>> one = torch.ones(1)
        >>> collapse(one, 0 * one, 3 * one, one)
        (tensor([4.]), tensor([0.7500]))
    """
    total = precision + importance
    share = torch.where(total > 0, importance / total, 1.0)
    rest = torch.where(total > 0, precision / total, 0.0)
    # From whichever mean weighs more, so that a small correction is added and nothing cancels.
    old, new = mean.to(share.dtype), anchor.to(share.dtype)
    moved = torch.where(share < 0.5, old + share * (new - old), new + rest * (old - new))
    return total, moved.to(mean.dtype)


@final
class EWC(Regularizer):
    """Elastic weight consolidation with exact per-sample importances.

    Nothing is held until the first ``consolidate(data)``, which estimates the importances.

    Args:
        strength: weight of the penalty; a number, a schedule ``step -> number``, or a mapping from
            globs to these.
        labels: of the Fisher information: ``"expected"`` over the model's own distribution,
            ``"sampled"`` from it, or the ``"true"`` labels (the empirical Fisher).
        decay: ``None`` for the exact sum over tasks; a number in [0, 1] for online EWC.
        select: which parameters, see :func:`guywire.select`.
        unit: of sequences: a ``"sample"`` is a whole sequence, or a ``"token"``.
        normalise: ``"mean"`` scales each task's importances to mean 1 over the selected parameters.
        decoupled: apply the pull to the parameters, times the learning rate.
        anchor_dtype: of the mean; the parameters' own if ``None``.
        keep: where mean and precision are: beside the parameters (``None``), in the CPU's memory
            (``"cpu"``), in nameless files mapped into memory (``"disk"``), or in files in a folder
            (a ``pathlib.Path``) of their own. Under FSDP2 each process keeps its shards.
        seed: of the generator behind ``labels="sampled"``.

    Raises:
        SelectionError: at attach, if the selection matches nothing.
        UsageError: at attach, if an argument makes no sense.

    Example:
        >>> import guywire as gw
        >>> model = nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> wires = gw.attach(model, optimizer, gw.EWC(strength=10.0))
        >>> wires.consolidate([(torch.randn(8, 3), torch.randint(2, (8,)))])
        >>> float(wires.penalty())  # at the anchor
        0.0
    """

    slug: ClassVar[str] = "rehearsal-free-cl"
    title: ClassVar[str] = "Overcoming catastrophic forgetting in neural networks"
    arxiv: ClassVar[str] = "1612.00796"
    place: ClassVar[str] = "step"
    memory: ClassVar[str] = "2"
    passes: ClassVar[str] = "1 a task"

    def __init__(
        self,
        strength: _anchored.Strengths = 100.0,
        *,
        labels: Literal["expected", "sampled", "true"] = "expected",
        decay: float | None = None,
        select: Selection = None,
        unit: Literal["sample", "token"] = "sample",
        normalise: Literal["mean"] | None = None,
        decoupled: bool = False,
        anchor_dtype: torch.dtype | None = None,
        keep: Keep = None,
        seed: int = 0,
    ) -> None:
        self.strength = strength
        self.labels: Literal["expected", "sampled", "true"] = labels
        self.decay = decay
        self.select = select
        self.unit: Literal["sample", "token"] = unit
        self.normalise = normalise
        self.decoupled = decoupled
        self.anchor_dtype = anchor_dtype
        self.keep: Keep = keep
        self.seed = seed
        self.mean_: Tensors = {}
        self.precision_: Tensors = {}
        self.tasks_ = 0
        self._binding = _anchored.Binding()

    def setup(self, model: nn.Module) -> None:
        """Bind to the model.

        Args:
            model: the user's module.

        Raises:
            UsageError: an argument makes no sense.
        """
        if self.decay is not None and not 0.0 <= self.decay <= 1.0:
            raise UsageError(f"decay={self.decay} must lie in [0, 1], or be None for the exact sum")
        if self.labels not in ("expected", "sampled", "true"):
            raise UsageError(f"labels={self.labels!r} is none of 'expected', 'sampled', 'true'")
        if self.normalise not in (None, "mean"):
            raise UsageError(f"normalise={self.normalise!r} is neither 'mean' nor None")
        self._binding.bind(model, self.select, self.strength)
        mean, precision = self._shelves()
        if self.mean_:
            params = self._binding.params
            self.mean_ = (
                _anchored.anchors_at_setup(model, params, "previous", self.mean_, None, mean) or {}
            )
            self.precision_ = _anchored.placed(self.precision_, params, precision)

    def before_step(self, step: Step) -> None:
        """Pull.

        Args:
            step: the step that is about to happen.
        """
        self._binding.apply(step, self.mean_, self.precision_, factor=2.0, decoupled=self.decoupled)

    def penalty(self) -> Tensor | None:
        """Return ``strength * sum precision * (theta - mean)^2``.

        Returns:
            A 0-d tensor, or ``None`` before the first ``consolidate``.
        """
        return self._binding.value(self.mean_, self.precision_)

    def consolidate(self, model: nn.Module, data: Iterable[Any] | None) -> None:
        """Estimate the importances of the task that ends, and add its quadratic.

        Args:
            model: the user's module.
            data: batches of the task.

        Raises:
            UsageError: there is no data.
            NonFiniteError: an importance is NaN or infinite; nothing is changed then.
        """
        if data is None:
            raise UsageError("EWC estimates importances from data: wires.consolidate(loader)")
        self._binding.bind(model, self.select, self.strength)
        params = self._binding.params
        generator = torch.Generator().manual_seed(self.seed + self.tasks_)
        wires = getattr(self, "_wires", None)
        importances = diagonal_fisher(
            model if wires is None else wires.model,  # DDP's wrapper says with whom to sum
            data,
            labels=self.labels,
            unit=self.unit,
            select=lambda name, _: name in params,
            generator=generator,
        )
        _finite(importances)
        if self.normalise == "mean":
            scale = _mean(importances)
            importances = {name: f / scale for name, f in importances.items()}
        if self.keep is None:
            for name, importance in importances.items():
                self._add(name, importance, tensors.clone(params[name], self.anchor_dtype))
        else:
            self._write(importances, params)
        self.tasks_ += 1

    def _write(self, importances: Tensors, params: Mapping[str, nn.Parameter]) -> None:
        """Do as ``_add`` does for all, one tensor at a time from the old place to the new one."""

        def summed(name: str) -> tuple[Tensor, Tensor]:
            importance, anchor = (tensors.local(t[name]) for t in (importances, params))
            anchor = anchor if self.anchor_dtype is None else anchor.to(self.anchor_dtype)
            if name not in self.precision_:
                return importance, anchor
            old = tensors.local(self.precision_[name]).to(importance.device)
            if self.decay is None:
                mean = tensors.local(self.mean_[name]).to(importance.device)
                return collapse(old, mean, importance, anchor)
            return self.decay * old + importance, anchor

        def items(part: int, held: Tensors) -> dict[str, Item]:
            found = {n: Item(t, t.dtype, lambda t=t: t) for n, t in held.items()}
            for name, importance in importances.items():
                anchor = self.anchor_dtype or params[name].dtype
                dtype = (importance.dtype, anchor)[part] if name not in held else held[name].dtype
                found[name] = Item(params[name], dtype, lambda n=name: summed(n)[part])
            return found

        # Both are computed anew for either file: twice the arithmetic, and no copy of the whole.
        mean, precision = self._shelves()
        new = precision.put(items(0, self.precision_)), mean.put(items(1, self.mean_))
        self.precision_, self.mean_ = new

    def _shelves(self) -> tuple[Shelf, Shelf]:
        return Shelf(self.keep, "ewc-mean"), Shelf(self.keep, "ewc-precision")

    def _add(self, name: str, importance: Tensor, anchor: Tensor) -> None:
        if name not in self.precision_:
            self.precision_[name], self.mean_[name] = importance, anchor
        elif self.decay is None:
            self.precision_[name], self.mean_[name] = collapse(
                self.precision_[name], self.mean_[name], importance, anchor
            )
        else:
            self.precision_[name] = self.decay * self.precision_[name] + importance
            self.mean_[name] = anchor

    def teardown(self) -> None:
        """Let go of the model; what was learnt stays."""
        self._binding.release()

    def state_dict(self) -> dict[str, Any]:
        """Return mean, precision and the number of tasks.

        Returns:
            The state.
        """
        return {"mean": self.mean_, "precision": self.precision_, "tasks": self.tasks_}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Args:
            state: from ``state_dict``.

        Raises:
            CheckpointError: it does not fit the model attached.
        """
        if state["tasks"] and not state["mean"]:
            # DCP reads only into what is there: EWC that has learnt nothing has no room.
            raise CheckpointError(
                f"the state is of {state['tasks']} tasks, but without importances: with "
                "torch.distributed.checkpoint load gw.sharded_state(wires, folder), not the wires"
            )
        params = self._binding.params
        _anchored.check_shapes(params, state["mean"], "the saved anchor")
        _anchored.check_shapes(params, state["precision"], "the saved importance")
        mean, precision = self._shelves()
        self.mean_ = _anchored.like(state["mean"], params, mean)
        self.precision_ = _anchored.like(state["precision"], params, precision)
        self.tasks_ = int(state["tasks"])


def _finite(importances: Tensors) -> None:
    for name, value in importances.items():
        if not bool(torch.isfinite(tensors.local(value)).all()):
            raise NonFiniteError(
                f"the importance of {name!r} is NaN or infinite: the model's loss on this data is "
                "not finite; nothing was changed"
            )


def _mean(importances: Tensors) -> float:
    total = tensors.reduce_shards(
        (f, tensors.local(f).double().sum()) for f in importances.values()
    )
    mean = 0.0 if total is None else float(total) / sum(f.numel() for f in importances.values())
    if mean <= 0.0:
        raise UsageError("all importances are zero: normalise='mean' has nothing to scale")
    return mean
