"""PELA: repair a factorised model by its original, then fine-tune the small model as usual.

For whoever wants a pretrained transformer with a half or a third of its weights and multiplications.
:func:`guywire.factorize` replaces each linear layer by two thin ones from its singular value
decomposition; a short stage of training on the original's kind of data repairs what that broke:

    L = L_task + feature L_fd + perturbation L_wp
    L_fd = 1/K sum_k MSE(h_k, h_k of the original)                 outputs of all K blocks
    L_wp = mean over layers of (max_ij |(W2 W1 - W)_ij| - epsilon)^2

L_wp is a squared distance to epsilon, not a hinge, and the maximum is over entries: its gradient
reaches one row of W2 and one column of W1. The released scripts for DeiT leave it out.

Source: Guo, Wang, Kankanhalli, "PELA: Learning Parameter-Efficient Models with Low-Rank
Approximation", arXiv 2310.10700. Padding is left out of L_fd where a batch has an attention mask.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from guywire.core import batches, selection
from guywire.core.aside import aside
from guywire.core.errors import AttachError, DataError, SelectionError
from guywire.core.regularizer import Regularizer, Strength, strength_at
from guywire.methods.adapters._taps import Taps, evaluating
from guywire.methods.adapters.low_rank import LowRank, dense_weight

__all__ = ["PELA", "block_distillation_loss", "perturbation_loss"]

# Entries of a chunk of rows of W2 W1 - W, so that no dense temporary is made.
_CHUNK = 1 << 20


def block_distillation_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of one block's outputs.

    Args:
        student: ``[batch, ...]``.
        teacher: the same shape; gets no gradient.
        mask: ``[batch, length]`` for outputs ``[batch, length, width]``: zero where padding is.

    Returns:
        The mean over all elements that count (0-d), at least in float32.

    Raises:
        DataError: the shapes differ.

    Example:
        >>> block_distillation_loss(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
        tensor(12.5000)
    """
    if student.shape != teacher.shape:
        raise DataError(
            f"a block gives {tuple(student.shape)} where the original gives "
            f"{tuple(teacher.shape)}: the teacher must be the model that was factorised"
        )
    wide = torch.promote_types(student.dtype, torch.float32)
    squares = (student.to(wide) - teacher.detach().to(wide)).square()
    if mask is None or squares.dim() != 3 or mask.shape != squares.shape[:2]:
        return squares.mean()
    mask = mask.to(squares)
    return (squares.mean(-1) * mask).sum() / mask.sum()


def perturbation_loss(
    first: Tensor, second: Tensor, weight: Tensor, epsilon: float = 1e-3
) -> Tensor:
    """Return ``(max_ij |(W2 W1 - W)_ij| - epsilon)^2`` of one layer.

    The largest entry is looked for in chunks of rows, without a graph; only that entry is computed
    with one, which is the whole gradient.

    Args:
        first: ``W1``, ``[r, in]``.
        second: ``W2``, ``[out, r]``.
        weight: ``W``, ``[out, in]``; gets no gradient.
        epsilon: the size of a deviation that is aimed at.

    Returns:
        A 0-d tensor, at least in float32.

    Raises:
        DataError: the shapes do not fit.

    Example:
        >>> eye = torch.eye(2)
        >>> perturbation_loss(eye, eye, torch.zeros(2, 2), epsilon=0.5)
        tensor(0.2500)
    """
    rows, columns = weight.shape
    if (second.shape[0], first.shape[1]) != (rows, columns) or second.shape[1] != first.shape[0]:
        raise DataError(
            f"factors {tuple(second.shape)} and {tuple(first.shape)} do not make "
            f"{tuple(weight.shape)}"
        )
    wide = torch.promote_types(second.dtype, torch.float32)
    with torch.no_grad():
        row, column = _largest(first.to(wide), second.to(wide), weight.to(wide))
        target = weight[row, column].to(wide)
    entry = (second[row].to(wide) * first[:, column].to(wide)).sum() - target
    return (entry.abs() - epsilon).square()


@final
class PELA(Regularizer):
    """Hold a factorised model to its original while it trains: block outputs, and weights.

    Add ``wires.loss(batch, outputs)`` to the task's loss, or train on it alone. The student's
    outputs are those of the forward pass that gave ``outputs``; the original runs once a step, in
    eval mode and without a graph, and its outputs are compared block by block, not kept. It is not
    part of the state.

    Args:
        teacher: the original model, on the same device; or a function that makes it of the model
            that is attached.
        feature: weight of L_fd; a number or a schedule ``step -> number``; at 0 the original is not
            run.
        perturbation: weight of L_wp, likewise.
        epsilon: of L_wp.
        blocks: globs over names of modules whose outputs are compared; by default the items of the
            model's outermost lists of modules that hold factorised layers.

    Raises:
        AttachError: at attach, if the original lacks what the model has, or the model is sharded.
        SelectionError: at attach, if nothing is factorised or no blocks are found.
        UsageError: at attach, if a weight makes no sense.

    Example:
        >>> import guywire as gw
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        >>> original = nn.TransformerEncoder(layer, 2)
        >>> model = gw.factorize(original, 2.0)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> wires = gw.attach(model, optimizer, gw.PELA(original, perturbation=0.0))
        >>> x = torch.randn(4, 5, 16)
        >>> bool(wires.loss((x, None), model(x)) > 0)
        True
    """

    slug: ClassVar[str] = "pela"
    title: ClassVar[str] = "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation"
    arxiv: ClassVar[str] = "2310.10700"
    place: ClassVar[str] = "loss"
    memory: ClassVar[str] = "the original model"
    passes: ClassVar[str] = "1 forward of the original a step"

    def __init__(
        self,
        teacher: nn.Module | Callable[[nn.Module], nn.Module],
        *,
        feature: Strength = 1.0,
        perturbation: Strength = 1.0,
        epsilon: float = 1e-3,
        blocks: Sequence[str] | None = None,
    ) -> None:
        self.teacher = teacher
        self.feature = feature
        self.perturbation = perturbation
        self.epsilon = epsilon
        self.blocks = blocks
        self._model: nn.Module | None = None
        self._original: nn.Module | None = None
        self._names: list[str] = []
        self._pairs: list[tuple[LowRank, Tensor]] = []
        self._taps: Taps | None = None

    def setup(self, model: nn.Module) -> None:
        """Bind to the model and listen to its blocks.

        Args:
            model: the user's module.

        Raises:
            AttachError: the original lacks what the model has, or the model is sharded.
            SelectionError: nothing is factorised, or no blocks are found.
            UsageError: a weight makes no sense.
        """
        for weight in (self.feature, self.perturbation, self.epsilon):
            strength_at(weight, 0)
        made = self.teacher if isinstance(self.teacher, nn.Module) else self.teacher(model)
        original = selection.unwrap(made)
        self._pairs = _pairs(model, original)
        off = not callable(self.feature) and self.feature == 0.0
        self._names = [] if off else _blocks(model, self.blocks)
        known = dict(original.named_modules())
        for name in self._names:
            if name not in known:
                raise AttachError(
                    f"the teacher has no module {name!r}: it must be the model that was factorised"
                )
        self._model, self._original = model, original
        self._taps = Taps(model, self._names)

    def loss(self, batch: Any, outputs: Any) -> Tensor | None:
        """Return ``feature L_fd + perturbation L_wp`` for a batch.

        Args:
            batch: the batch.
            outputs: what the model returned for it; ``None`` runs the model once more.

        Returns:
            A 0-d tensor, or ``None`` where both weights are 0.

        Raises:
            DataError: a block did not run, or its output differs in shape from the original's.
        """
        if self._model is None or self._original is None or self._taps is None:
            return None
        # Taken whatever comes, so that no graph outlives its batch.
        seen = self._taps.take()
        wires = getattr(self, "_wires", None)
        number = 0 if wires is None else wires.steps
        feature = strength_at(self.feature, number)
        perturbation = strength_at(self.perturbation, number)
        terms: list[Tensor] = []
        if feature > 0.0:
            if outputs is None or len(seen) < len(self._names):
                seen = self._run(self._model, batch)
            terms.append(feature * self._distil(batch, seen))
        if perturbation > 0.0:
            parts = [
                perturbation_loss(pair.first.weight, pair.second.weight, weight, self.epsilon)
                for pair, weight in self._pairs
            ]
            terms.append(perturbation * torch.stack(parts).mean())
        return sum(terms[1:], terms[0]) if terms else None

    def teardown(self) -> None:
        """Stop listening and let go of both models."""
        if self._taps is not None:
            self._taps.remove()
        self._model = self._original = self._taps = None
        self._pairs, self._names = [], []

    def _run(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        taps = Taps(model, self._names, ours=True)
        try:
            with aside():
                batches.forward(model, batch)
            return taps.take()
        finally:
            taps.remove()

    def _distil(self, batch: Any, seen: Mapping[str, Tensor]) -> Tensor:
        missing = [name for name in self._names if name not in seen]
        if missing:
            raise DataError(
                f"the block {missing[0]!r} gave no tensor in the forward pass: name others (blocks=)"
            )
        assert self._original is not None
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        terms: list[Tensor] = []

        def compare(name: str, output: Tensor) -> None:
            # A decoder's positions are not those that the mask speaks of.
            own = None if "decoder" in name.split(".") else mask
            with torch.enable_grad():
                terms.append(block_distillation_loss(seen[name], output, own))

        taps = Taps(self._original, self._names, ours=True, then=compare)
        try:
            with torch.no_grad(), aside(), evaluating(self._original):
                batches.forward(self._original, batch)
        finally:
            taps.remove()
        return torch.stack(terms).mean()


def _largest(first: Tensor, second: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column of the largest entry of ``|W2 W1 - W|``, as 0-d tensors."""
    columns = weight.shape[1]
    best = weight.new_full((), -1.0)
    at = torch.zeros((), dtype=torch.long, device=weight.device)
    step = max(1, _CHUNK // columns)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        gaps = torch.addmm(weight[rows], second[rows], first, beta=-1).abs_()
        value, index = gaps.flatten().max(0)
        # No .item(): a GPU would have to be waited for.
        at = torch.where(value > best, index + start * columns, at)
        best = torch.maximum(best, value)
    return at // columns, at % columns


def _pairs(model: nn.Module, original: nn.Module) -> list[tuple[LowRank, Tensor]]:
    """Return each factorised layer with the original's weight ``[out, in]``."""
    layers = dict(original.named_modules())
    found: list[tuple[LowRank, Tensor]] = []
    for name, module in model.named_modules():
        if not isinstance(module, LowRank):
            continue
        if any(hasattr(p, "device_mesh") for p in module.parameters()):
            raise AttachError(
                f"{name!r} is sharded by fully_shard, and the weights' perturbation needs whole "
                "factors: use DDP"
            )
        layer = layers.get(name)
        if not isinstance(getattr(layer, "weight", None), Tensor):
            raise AttachError(
                f"the teacher has no linear layer {name!r}: it must be the model that was factorised"
            )
        assert layer is not None
        weight = dense_weight(layer).detach()
        if weight.shape != (module.out_features, module.in_features):
            raise AttachError(
                f"the teacher's {name!r} has the shape {tuple(weight.shape)}, the factors make "
                f"{(module.out_features, module.in_features)}: it must be the model that was "
                "factorised"
            )
        found.append((module, weight))
    if not found:
        raise SelectionError(
            f"{type(model).__name__} has no factorised layers: train what gw.factorize returns"
        )
    return found


def _blocks(model: nn.Module, blocks: Sequence[str] | None) -> list[str]:
    """Return the names of the blocks whose outputs are compared."""
    modules = dict(model.named_modules())
    if blocks is not None:
        found = [n for n in modules if n and any(fnmatchcase(n, glob) for glob in blocks)]
        if not found:
            near = difflib.get_close_matches("".join(blocks), modules, 3, 0.3)
            raise SelectionError(
                f"blocks={list(blocks)} matches no module; near misses: "
                f"{', '.join(near or list(modules)[1:4])}"
            )
        return found
    out: list[str] = []
    for name, module in modules.items():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{b}.") for b in out):
            continue
        for index, item in module.named_children():
            if any(isinstance(m, LowRank) for m in item.modules() if m is not item):
                out.append(f"{name}.{index}" if name else index)
    if not out:
        raise SelectionError(
            f"{type(model).__name__} has no list of blocks (nn.ModuleList): name the modules whose "
            "outputs to compare with blocks=[...]"
        )
    return out
