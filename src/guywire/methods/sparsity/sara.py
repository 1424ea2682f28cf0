"""SaRA: fine-tune only the weights that are nearly zero in the pretrained network.

For whoever fine-tunes a large pretrained model, a diffusion model say, in little memory and wants
the rest of it to stay bit for bit as it was. Entries of a tensor below a threshold did next to
nothing so far; they alone are trained. Gradients and optimiser state exist for them only, which is
3 numbers for each chosen entry under Adam, whatever the size of the model.

    minimise  L(P) + strength * sum_l |P_l * M_l|_*     over the entries in M,  M = 1[|P_0| < threshold]

P: the model's tensors, P_0 pretrained; M: the mask of each; |.|_*: the nuclear norm, of the present
values and not of their change. The released code adds the norm of one matrix drawn at random each
step. Half-way, training goes on with those entries of M that are still below the threshold, and the
others keep what they learnt.

Source: Hu, Yi, Tao, Zhu, Chen, Zhang, Li, "SaRA: High-Efficient Diffusion Model Fine-tuning with
Progressive Sparse Low-Rank Adaptation", ICLR 2025, arXiv 2409.06633. Two slips of the released
lean optimiser are not copied: it writes absolute values into the model when it starts, and its rank
loss goes into tensors that nobody optimises.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from guywire.core import selection
from guywire.core.attach import Wires
from guywire.core.errors import AttachError, SelectionError, UsageError
from guywire.core.processes import data_parallel
from guywire.core.regularizer import Regularizer, Step, Strength, strength_at
from guywire.core.selection import Selection
from guywire.methods.sparsity import _vectors
from guywire.methods.sparsity._vectors import Vectors
from guywire.methods.sparsity.smallest import nuclear_norm, smallest_masks, threshold_of_share

__all__ = ["SaRA"]


@final
class SaRA(Regularizer):
    """Train the smallest weights only, in memory of their size, at low rank, in two stages.

    Prepare the model, build any optimiser from what that returns, attach::

        sara = gw.SaRA(share=0.05, reselect_at=2500)
        optimizer = torch.optim.AdamW(sara.prepare(model), lr=5e-4)
        wires = gw.attach(model, optimizer, sara)

    With the Hugging Face Trainer, pass ``optimizers=(optimizer, None)``, or let it build its own
    from the prepared model, with ``GuywireCallback(sara)`` either way. The model keeps its classes,
    names and ``state_dict``; the vectors are parameters of a submodule, so that clipping, DDP and
    ``zero_grad`` reach them. Weights change once an optimiser step. ``gw.sara_fold(model)`` takes
    the vectors out and leaves an ordinary model.

    Tensors outside the selection are left as they are: freeze them, or train them beside.

    Args:
        strength: of the nuclear norm; the paper's appendix has 5e-3, its code's commands 5e-4.
        threshold: absolute value below which a pretrained entry is trained; the paper has 2e-4,
            8e-4 and 2e-3 for Stable Diffusion 1.5.
        share: instead of a threshold, the share of all selected entries to train.
        select: which tensors, see :func:`guywire.select`; biases and zero-initialised layers
            consist of small entries and are trained whole unless left out.
        reselect_at: optimiser steps after which to go on with the entries that are still small;
            the paper takes half of all steps. ``None`` for never.
        moments: at that point, ``"keep"`` the surviving entries' optimiser state, or ``"reset"``.
        rank_of: ``"one"`` matrix drawn at random each step, as released; ``"sum"``, that one times
            the number of matrices, which is the sum over all of them on average; or ``"all"``.
        rank_above: matrices whose smaller side is longer than this have a nuclear norm in the loss.
        seed: of the draws; the matrix of a step depends on it and the step's number alone.

    Raises:
        AttachError: at attach, if the model is not prepared.
        SelectionError: if the selection matches nothing.
        UsageError: if an argument makes no sense.

    Example:
        >>> import guywire as gw
        >>> model = nn.Linear(20, 10)
        >>> sara = gw.SaRA(share=0.1)
        >>> optimizer = torch.optim.AdamW(sara.prepare(model), lr=0.01)
        >>> sum(p.numel() for p in sara.parameters())
        21
        >>> before = model.weight.detach().clone()
        >>> with gw.attach(model, optimizer, sara):
        ...     model(torch.ones(4, 20)).square().mean().backward()
        ...     optimizer.step()
        >>> 0 < int((model.weight != before).sum()) <= 21
        True
    """

    slug: ClassVar[str] = "sara"
    title: ClassVar[str] = (
        "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank "
        "Adaptation"
    )
    arxiv: ClassVar[str] = "2409.06633"
    place: ClassVar[str] = "weight"
    memory: ClassVar[str] = "2 x share (saves 3 x (1 - share) under Adam)"
    passes: ClassVar[str] = "0"

    def __init__(
        self,
        strength: Strength = 5e-4,
        *,
        threshold: float | None = None,
        share: float | None = None,
        select: Selection = None,
        reselect_at: int | None = None,
        moments: Literal["keep", "reset"] = "keep",
        rank_of: Literal["one", "sum", "all"] = "one",
        rank_above: int = 64,
        seed: int = 0,
    ) -> None:
        self.strength = strength
        self.threshold = threshold
        self.share = share
        self.select = select
        self.reselect_at = reselect_at
        self.moments = moments
        self.rank_of = rank_of
        self.rank_above = rank_above
        self.seed = seed
        self.reselected_ = False
        self._wires: Wires | None = None  # set by attach
        self._vectors: Vectors | None = None
        self._names: list[str] = []

    def prepare(
        self, model: nn.Module, masks: Mapping[str, Tensor] | None = None
    ) -> list[nn.Parameter]:
        """Choose the entries and make a leaf vector of each selected tensor's.

        Call it on the pretrained model, before DDP wraps it and before the optimiser is built.

        Args:
            model: the user's module; changed in place.
            masks: names to boolean masks of entries to train, instead of the smallest ones. With
                ``reselect_at`` a threshold is needed as well.

        Returns:
            The vectors, for the optimiser.

        Raises:
            UsageError: neither or both of threshold and share are given, or the model is prepared
                already.
            SelectionError: the selection matches nothing.
            AttachError: the model is sharded, or wrapped by DDP.
        """
        self._check()
        if masks is None:
            params = selection.select(model, self.select)
            if (self.threshold is None) == (self.share is None):
                raise UsageError(
                    f"threshold={self.threshold} and share={self.share}: give one of the two, it "
                    "says which entries are small"
                )
            limit = self.threshold
            if limit is None:
                assert self.share is not None
                limit = threshold_of_share(params.values(), self.share)
            masks = smallest_masks(params, limit)
            self._vectors = _vectors.install(model, masks, limit)
        else:
            self._vectors = _vectors.install(model, masks, None)
        return self.parameters()

    def parameters(self) -> list[nn.Parameter]:
        """Return the vectors of the model that was prepared or attached last.

        Returns:
            One parameter ``[k]`` for each selected tensor.

        Raises:
            AttachError: there is no such model.
        """
        if self._vectors is None:
            raise AttachError("SaRA has no model yet: call sara.prepare(model) first")
        return [self._vectors.vector(name) for name in self._vectors.names()]

    def setup(self, model: nn.Module) -> None:
        """Find the model's vectors.

        Args:
            model: the user's module, prepared.
        """
        self._check()
        vectors = _vectors.of(model)
        if self.reselect_at is not None:
            self._threshold(vectors)
            if data_parallel(getattr(self._wires, "model", None)) is not None:
                raise AttachError(
                    f"reselect_at={self.reselect_at} makes the vectors shorter, and DDP has buffers "
                    "of their first lengths: train in two stages, wrapping anew for the second"
                )
        self._names = _selected(model, vectors, self.select)
        self._vectors = vectors

    def before_step(self, step: Step) -> None:
        """Add the nuclear norm's gradient to the vectors' gradients.

        Args:
            step: the step that is about to happen.
        """
        strength = strength_at(self.strength, step.number)
        if strength == 0.0 or step.skipped:
            return
        matrices = self._matrices()
        scale = strength * step.scale * (len(matrices) if self.rank_of == "sum" else 1)
        for name in self._drawn(matrices, step.number):
            vector = self._home().vector(name)
            if not step.owns(vector) or vector.numel() == 0:
                continue
            _, gradient = nuclear_norm(self._chosen(name))
            pull = _vectors.gather(gradient, self._home().index[name])
            if vector.grad is None:
                vector.grad = torch.zeros_like(vector)
            vector.grad.add_(pull, alpha=scale)

    def after_step(self, step: Step) -> None:
        """Write the vectors into the weights; at ``reselect_at`` choose again.

        Args:
            step: the step that has happened.
        """
        vectors = self._home()
        for name in vectors.names():
            vectors.write(name)
        if self.reselect_at == step.number + 1 and not self.reselected_:
            self.reselect(step.optimizer)
            step.reshaped = True

    def reselect(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Go on with the entries that are still below the threshold; settle the others.

        Called by itself at ``reselect_at``. A loop that calls it says ``wires.refresh()`` after it.

        Args:
            optimizer: whose state of the vectors is shortened or reset.

        Raises:
            AttachError: there is no model.
            UsageError: there is no threshold.
        """
        vectors = self._home()
        limit = self._threshold(vectors)
        for name in self._names:
            vector = vectors.vector(name)
            kept = vector.detach().abs() < limit
            vectors.write(name)
            index, settled = vectors.index[name], vectors.settled[name]
            if optimizer is not None:
                _shorten(optimizer, vector, kept, reset=self.moments == "reset")
            settled = torch.cat([settled, index[~kept]])
            vectors.put(name, index[kept], settled, vector.detach()[kept])
        self.reselected_ = True

    def penalty(self) -> Tensor | None:
        """Return what the nuclear norms add to the loss of the step that comes next.

        Returns:
            A 0-d tensor: for ``rank_of="one"`` of the matrix that this step draws; ``None`` if no
            matrix is large enough.
        """
        matrices = self._matrices()
        if not matrices:
            return None
        number = self._wires.steps if self._wires is not None else 0
        drawn = self._drawn(matrices, number)
        values = [nuclear_norm(self._chosen(name))[0] for name in drawn]
        total = torch.stack([v.to(values[0]) for v in values]).sum()
        scale = len(matrices) if self.rank_of == "sum" else 1
        return strength_at(self.strength, number) * scale * total

    def teardown(self) -> None:
        """Let go of the model, which stays prepared."""
        self._vectors = None
        self._names = []

    def state_dict(self) -> dict[str, Any]:
        """Return the vectors in full precision, and which entries they are.

        Returns:
            The state.
        """
        vectors = self._home()
        return {
            "reselected": self.reselected_,
            "threshold": vectors.threshold,
            "vectors": {n: vectors.vector(n).detach() for n in vectors.names()},
            "index": dict(vectors.index),
            "settled": dict(vectors.settled),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave; load the model's own state before.

        Args:
            state: from ``state_dict``.

        Raises:
            CheckpointError: it does not fit the model.
        """
        vectors = self._home()
        _vectors.check_fits(vectors, state["index"])
        for name in vectors.names():
            vectors.put(name, state["index"][name], state["settled"][name], state["vectors"][name])
        vectors.threshold = state["threshold"]
        self.reselected_ = bool(state["reselected"])

    def _check(self) -> None:
        strength_at(self.strength, 0)
        if self.rank_of not in ("one", "sum", "all"):
            raise UsageError(f"rank_of={self.rank_of!r} is none of 'one', 'sum', 'all'")
        if self.moments not in ("keep", "reset"):
            raise UsageError(f"moments={self.moments!r} is neither 'keep' nor 'reset'")
        if self.reselect_at is not None and self.reselect_at < 1:
            raise UsageError(f"reselect_at={self.reselect_at}: choose again after 1 step or more")

    def _home(self) -> Vectors:
        if self._vectors is None:
            raise AttachError("SaRA has no model: attach it, or call sara.prepare(model)")
        return self._vectors

    def _threshold(self, vectors: Vectors) -> float:
        limit = vectors.threshold if self.threshold is None else self.threshold
        if limit is None:
            raise UsageError(
                "the masks were given, so nothing says which entries are still small: give "
                "SaRA(threshold=...) as well, or reselect_at=None"
            )
        return limit

    def _matrices(self) -> list[str]:
        home = self._home()
        shapes = {name: home.weight(name).shape for name in self._names}
        return [n for n, s in shapes.items() if len(s) == 2 and min(s) > self.rank_above]

    def _drawn(self, matrices: list[str], number: int) -> list[str]:
        if self.rank_of == "all" or not matrices:
            return matrices
        # Seeded by the step, so that it is the same on every process, and after a resume.
        return [random.Random(f"{self.seed}/{number}").choice(matrices)]

    def _chosen(self, name: str) -> Tensor:
        """Return P * M from the vector, in the vector's precision."""
        home = self._home()
        vector = home.vector(name).detach()
        matrix = vector.new_zeros(home.weight(name).shape)
        _vectors.scatter(matrix, home.index[name], vector)
        return matrix


def _selected(model: nn.Module, vectors: Vectors, select: Selection) -> list[str]:
    """Return the tensors with vectors that a selection names."""
    chosen = selection.select(model, select, frozen=True)
    names = [name for name in vectors.names() if name in chosen]
    if not names:
        raise SelectionError(
            f"the selection {select!r} matches none of the {len(vectors.names())} tensors that the "
            f"model was prepared for ({', '.join(vectors.names()[:3])}, ...)"
        )
    return names


def _shorten(
    optimizer: torch.optim.Optimizer, vector: nn.Parameter, kept: Tensor, *, reset: bool
) -> None:
    """Keep the surviving entries' part of whatever the optimiser remembers of a vector."""
    state = optimizer.state.get(vector)
    if state is None:
        return
    if reset:
        del optimizer.state[vector]
        return
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == vector.shape:
            state[key] = value[kept]
