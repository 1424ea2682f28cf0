"""AdamR: decay towards the pretrained weights beside Adam, so that little is left to prune.

For whoever fine-tunes and means to prune the change afterwards: a change that is small everywhere
survives DARE at rates where a free one breaks. Before each Adam step

    theta <- theta - lr * strength / s * (theta - anchor)          (L2)
    theta <- theta - lr * strength / s * sign(theta - anchor)      (L1)

with ``s`` the root mean square of Adam's denominator: ``s^2`` is the mean of the bias-corrected
second moment over *all* parameters of the optimiser that have a gradient, as this very step will
see it. Dividing by one global number keeps the decay as strong as a coupled penalty would be
without distorting it weight by weight. L1 stops at the anchor instead of jumping over it, and leaves
most of the change in few weights: the alternative for pruning by magnitude.

Source: "DARE the Extreme", arXiv 2410.09344, section 5.1 and its released optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from guywire.core import selection, tensors
from guywire.core.errors import AttachError, CheckpointError, UsageError
from guywire.core.regularizer import Regularizer, Step, Strength, strength_at
from guywire.core.selection import Selection
from guywire.core.tensors import Tensors

__all__ = ["AdamR", "global_rms"]


@final
class AdamR(Regularizer):
    """Decay parameters towards an anchor, in step with any optimiser of Adam's kind.

    The divisor is one global number, so the decay depends on the scale of the loss: unscale AMP
    gradients before the step, as ``GradScaler`` does.

    Args:
        strength: of the decay; a number or a schedule ``step -> number``. Tune it per task.
        kind: ``"l2"`` or ``"l1"``.
        select: which parameters; leave the head out, it has no pretrained weights.
        anchor: names to pretrained tensors; parameters without one are free. ``None`` takes the
            parameters where they are at the first ``attach``, and keeps that for good.
        anchor_dtype: of the anchors, e.g. bfloat16 to save memory; the parameters' own if ``None``.

    Raises:
        AttachError: the optimiser keeps no second moments of Adam's kind.
        SelectionError: at attach, if the selection matches nothing.
        UsageError: at attach, if strength, kind or anchor make no sense.

    Example:
        >>> import guywire as gw
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        >>> with gw.attach(model, optimizer, gw.AdamR(strength=1e-3)):
        ...     model(torch.ones(4, 2)).sum().backward()
        ...     optimizer.step()
    """

    slug: ClassVar[str] = "darex"
    title: ClassVar[str] = (
        "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models"
    )
    arxiv: ClassVar[str] = "2410.09344"
    place: ClassVar[str] = "step"
    memory: ClassVar[str] = "1"
    passes: ClassVar[str] = "0"
    decoupled: ClassVar[bool] = True
    """The decay bypasses the gradients, and is no part of a closure's loss."""

    def __init__(
        self,
        strength: Strength = 1e-4,
        *,
        kind: Literal["l2", "l1"] = "l2",
        select: Selection = None,
        anchor: Mapping[str, Tensor] | None = None,
        anchor_dtype: torch.dtype | None = None,
    ) -> None:
        self.strength = strength
        self.kind: Literal["l2", "l1"] = kind
        self.select = select
        self.anchor = anchor
        self.anchor_dtype = anchor_dtype
        self.anchors_: Tensors | None = None
        self.rms_: float | None = None
        self._params: dict[str, nn.Parameter] = {}
        self._number = 0

    def setup(self, model: nn.Module) -> None:
        """Bind to the model; the first time, take the anchors.

        Args:
            model: the user's module.
        """
        strength_at(self.strength, 0)
        if self.kind not in ("l2", "l1"):
            raise UsageError(f"kind={self.kind!r} is neither 'l2' nor 'l1'")
        wires = getattr(self, "_wires", None)
        if wires is not None:
            _check(wires.optimizer)
        params = selection.select(model, self.select)
        self.anchors_ = self._anchors(model, params)
        self._params = params

    def before_step(self, step: Step) -> None:
        """Decay.

        Args:
            step: the step that is about to happen.
        """
        self._number = step.number
        strength = strength_at(self.strength, step.number)
        if step.evaluation > 0 or strength == 0.0 or self.anchors_ is None:
            return
        self.rms_ = global_rms(step.optimizer, step.scale)
        rows = [
            (tensors.local(p), tensors.local(self.anchors_[name]), step.lr(p))
            for name, p in self._params.items()
            if name in self.anchors_ and step.owns(p) and p.grad is not None
        ]
        params, anchors = [p for p, _, _ in rows], [a for _, a, _ in rows]
        rates = [lr * strength / self.rms_ for _, _, lr in rows]
        if self.kind == "l2":
            tensors.pull_towards(params, anchors, rates)
        else:
            tensors.shrink_towards(params, anchors, rates)

    def penalty(self) -> Tensor | None:
        """Return ``strength / s * sum (theta - anchor)^2 / 2``, or with ``|theta - anchor|``.

        Its gradient is what the last step decayed along.

        Returns:
            A 0-d tensor, or ``None`` before the first step.
        """
        if self.rms_ is None or self.anchors_ is None:
            return None
        factor = strength_at(self.strength, self._number) / self.rms_
        power, share = (2, 0.5) if self.kind == "l2" else (1, 1.0)
        parts = [
            (p, share * factor * tensors.distance(*map(tensors.local, (p, a)), power=power))
            for name, p in self._params.items()
            if (a := self.anchors_.get(name)) is not None
        ]
        return tensors.reduce_shards(parts)

    def teardown(self) -> None:
        """Let go of the model; the anchors stay."""
        self._params = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the anchors, and the last divisor for logs.

        Returns:
            The state.
        """
        return {"anchors": self.anchors_, "rms": self.rms_}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back.

        Args:
            state: from ``state_dict``.

        Raises:
            CheckpointError: an anchor does not fit the model attached.
        """
        anchors: Tensors | None = state["anchors"]
        if anchors is not None:
            for name, p in self._params.items():
                if name in anchors and anchors[name].shape != p.shape:
                    raise CheckpointError(_misfit(name, anchors[name], p))
            anchors = {name: self._placed(name, a, self._params) for name, a in anchors.items()}
        self.anchors_, self.rms_ = anchors, state["rms"]

    def _anchors(self, model: nn.Module, params: Mapping[str, nn.Parameter]) -> Tensors:
        dtype = self.anchor_dtype
        if self.anchors_ is not None:
            if not self.anchors_.keys() & params.keys():
                raise AttachError(
                    "this AdamR took its anchors from another model (none of its parameters is "
                    "here): make a new one"
                )
            return {n: self._placed(n, a, params, copy=False) for n, a in self.anchors_.items()}
        if self.anchor is None:
            return {name: tensors.clone(p, dtype) for name, p in params.items()}
        known = {selection.canonical(n) for n, _ in model.named_parameters(remove_duplicate=False)}
        known |= {selection.canonical(n) for n, _ in model.named_buffers()}
        given = {n: t if dtype is None else t.to(dtype) for n, t in self.anchor.items()}
        if unknown := sorted(given.keys() - known):
            raise UsageError(
                f"the anchor names {unknown[0]!r}, which the model lacks: give tensors under the "
                "names of named_parameters()"
            )
        given = {name: t for name, t in given.items() if name in params}
        if not given:
            raise UsageError(
                f"the anchor names none of the {len(params)} selected parameters: give tensors "
                "under the names of named_parameters()"
            )
        for name, anchor in given.items():
            if anchor.shape != params[name].shape:
                raise UsageError(_misfit(name, anchor, params[name]))
        return {name: self._placed(name, t, params) for name, t in given.items()}

    @staticmethod
    def _placed(
        name: str, anchor: Tensor, params: Mapping[str, nn.Parameter], *, copy: bool = True
    ) -> Tensor:
        anchor = tensors.clone(anchor) if copy else anchor
        return tensors.place_like(anchor, params[name]) if name in params else anchor


def global_rms(optimizer: torch.optim.Optimizer, scale: float = 1.0) -> float:
    """Return the root mean square of Adam's denominator in the step that is about to happen.

    ``sqrt(mean v_hat)`` with ``v_hat`` the bias-corrected second moment *after* this step's update,
    over all parameters of all groups that have a gradient. Under FSDP2 the sums are taken over all
    shards: one collective call, which every process must make.

    Args:
        optimizer: Adam, AdamW, NAdam or RAdam, with gradients.
        scale: an AMP scale that still lies on the gradients.

    Returns:
        The number; 1 where all moments are zero.

    Raises:
        AttachError: the optimiser keeps no such moments.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    count = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                gradient = tensors.local(p.grad)
                parts.append((p, _second_moments(optimizer, group, p, gradient, scale)))
                count += p.numel()
    total = tensors.reduce_shards(parts)
    mean = 0.0 if total is None else float(total) / count
    return mean**0.5 if mean > 0.0 else 1.0


def _second_moments(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    p: nn.Parameter,
    gradient: Tensor,
    scale: float,
) -> Tensor:
    """Return the sum of one parameter's local ``v_hat`` after the step, without a copy of it."""
    state = optimizer.state.get(p, {})
    if state and "exp_avg_sq" not in state:
        raise _no_moments(optimizer)
    beta = float(group["betas"][1])
    if scale != 1.0:
        gradient = gradient / scale
    if group.get("weight_decay") and not _decoupled(optimizer, group):
        gradient = gradient.add(tensors.local(p), alpha=group["weight_decay"])
    wide = torch.promote_types(gradient.dtype, torch.float32)
    squares = torch.linalg.vector_norm(gradient, dtype=wide).square()
    if not state:
        return squares  # (1 - beta) g^2 / (1 - beta)
    moments = tensors.local(state["exp_avg_sq"]).sum(dtype=wide)
    done = state["step"]
    done = torch.as_tensor(done, dtype=wide).to(squares.device)
    # 1 - beta^t, without the cancellation that float32 would suffer from.
    return (beta * moments + (1.0 - beta) * squares) / -torch.expm1((done + 1) * math.log(beta))


def _decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))


def _check(optimizer: torch.optim.Optimizer) -> None:
    if not all("betas" in group for group in optimizer.param_groups):
        raise _no_moments(optimizer)


def _no_moments(optimizer: torch.optim.Optimizer) -> AttachError:
    return AttachError(
        f"AdamR divides by Adam's second moments, and {type(optimizer).__name__} keeps none under "
        "'exp_avg_sq': use Adam or AdamW, or gw.L2(..., decoupled=True)"
    )


def _misfit(name: str, anchor: Tensor, p: Tensor) -> str:
    return (
        f"the anchor of {name!r} has the shape {tuple(anchor.shape)}, the parameter "
        f"{tuple(p.shape)}: leave it out of the selection, or give one that fits"
    )
