"""Draw a half of a transformer's matrices; reset the rest of a tuned model to its base.

The functions of half fine-tuning, without its regularizer
(:class:`guywire.HalfFineTuning`), which see for the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from guywire.core import selection
from guywire.core.errors import UsageError
from guywire.core.tensors import Tensors
from guywire.methods.sparsity import _pieces
from guywire.methods.sparsity._pieces import Piece

__all__ = ["Level", "draw", "half", "half_fractions", "half_reset"]

Level = Literal["category", "layer", "model"]


def half(
    model: nn.Module,
    seed: int = 0,
    round: int = 0,  # the paper's word
    level: Level = "category",
    ratio: float = 0.5,
    *,
    categories: Mapping[str, str] | None = None,
    epoch: int = 0,
) -> list[str]:
    """Draw which parameters are updated in a round.

    The draw depends on its arguments and on the model's names only: it is the same in every process
    and after a resume. Parts of fused parameters are named as Python would index them, such as
    ``"h.0.attn.c_attn.weight[:, 0:768]"`` for the queries of a GPT-2 layer.

    Args:
        model: a transformer, plain or wrapped; whether parameters require gradients plays no part.
        seed: of the draw, at least 0.
        round: of fine-tuning: each has a half of its own.
        level: ``"category"`` balances within every layer and kind of matrix (the paper's),
            ``"layer"`` takes whole layers, ``"model"`` any matrices.
        ratio: the updated fraction, 0 to 1.
        categories: globs over parameter names to ``attention``, ``feed-forward``, ``norm`` or
            ``always``, for what names and types do not tell.
        epoch: a further number for the draw.

    Returns:
        Names to update, in the model's order; all that is outside of layers is among them.

    Raises:
        SelectionError: there are no transformer layers, or something in one is not recognised.
        UsageError: another argument makes no sense.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.TransformerEncoder(layer, 2)
        >>> for name in half(model, seed=1)[:3]:
        ...     print(name)
        layers.0.self_attn.in_proj_weight[0:8]
        layers.0.self_attn.in_proj_weight[8:16]
        layers.0.self_attn.in_proj_bias[0:8]
    """
    pieces = _pieces.pieces_of(model, categories)
    return _updated(model, pieces, draw(pieces, seed, round, level, ratio, epoch))


def half_fractions(
    model: nn.Module, names: Iterable[str], *, categories: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Return which fraction of the parameters is updated, by category.

    With grouped queries, or matrices of unequal size, half of the matrices is not half of the
    parameters: this is what to log.

    Args:
        model: the model.
        names: from :func:`half`.
        categories: as for :func:`half`.

    Returns:
        Fractions for ``attention``, ``feed-forward``, ``norm`` (those that there are), ``layers``
        (all of these together) and ``model``.

    Raises:
        SelectionError: as :func:`half`.
    """
    params = selection.named_parameters(model)
    updated = set(names)
    totals: dict[str, int] = {}
    moving: dict[str, int] = {}
    for piece in _pieces.pieces_of(model, categories):
        for name in piece.names:
            whole, index = _pieces.parse(name)
            size = params[whole].numel() if index is None else params[whole][index].numel()
            moves = size if name in updated or whole in updated else 0
            for key in (piece.category, "layers"):
                totals[key] = totals.get(key, 0) + size
                moving[key] = moving.get(key, 0) + moves
    everything = sum(p.numel() for p in params.values())
    out = {key: moving[key] / totals[key] for key in totals}
    out["model"] = 1.0 - (totals["layers"] - moving["layers"]) / everything
    return out


def half_reset(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], names: Iterable[str]
) -> Tensors:
    """Set what is not named back to the base: ``M tuned + (1 - M) base`` ("Half-Reset").

    Args:
        tuned: names to tensors of a fine-tuned model, such as its state dict.
        base: the same of the model it came from.
        names: what stays tuned, from :func:`half`.

    Returns:
        Names to new tensors.

    Raises:
        UsageError: names or shapes do not fit.

    Example:
        >>> import torch
        >>> half_reset(
        ...     {"a": torch.ones(2), "b": torch.ones(2)},
        ...     {"a": torch.zeros(2), "b": torch.zeros(2)},
        ...     ["a", "b[0:1]"],
        ... )
        {'a': tensor([1., 1.]), 'b': tensor([1., 0.])}
    """
    parts: dict[str, list[_pieces.Index | None]] = {}
    for name in names:
        whole, index = _pieces.parse(name)
        if whole not in tuned:
            raise UsageError(f"the name {name!r} is none of the {len(tuned)} tuned tensors'")
        parts.setdefault(whole, []).append(index)
    out: Tensors = {}
    for name, value in tuned.items():
        kept = parts.get(name, [])
        if None in kept:
            out[name] = value.detach().clone()
            continue
        if name not in base or base[name].shape != value.shape:
            what = "is not in the base" if name not in base else "has another shape in the base"
            raise UsageError(f"{name!r} {what}: name it among what stays tuned, or leave it out")
        out[name] = base[name].detach().to(value).clone()
        for index in kept:
            if index is not None:
                out[name][index] = value.detach()[index]
    return out


def _updated(model: nn.Module, pieces: Sequence[Piece], drawn: set[Piece]) -> list[str]:
    """Return the names of drawn pieces and of all that is in no piece, in the model's order."""
    by_parameter: dict[str, list[str]] = {}
    chosen: set[str] = set()
    for piece in pieces:
        for name in piece.names:
            by_parameter.setdefault(_pieces.parse(name)[0], []).append(name)
        if piece in drawn:
            chosen.update(piece.names)
    out: list[str] = []
    for name in selection.named_parameters(model):
        out += [part for part in by_parameter.get(name, []) if part in chosen]
        if name not in by_parameter:
            out.append(name)
    return _pieces.merged(out, pieces)


def draw(
    pieces: Sequence[Piece], seed: int, round: int, level: Level, ratio: float, epoch: int
) -> set[Piece]:
    """Choose the pieces to update.

    Args:
        pieces: all of them.
        seed: as for :func:`half`, like the rest.
        round: likewise.
        level: likewise.
        ratio: likewise.
        epoch: likewise.

    Returns:
        The chosen ones.

    Raises:
        UsageError: an argument makes no sense.
    """
    if not 0.0 <= ratio <= 1.0:
        raise UsageError(f"ratio is {ratio}: it must be a fraction from 0 to 1")
    if min(seed, round, epoch) < 0:
        raise UsageError(f"seed {seed}, round {round} and epoch {epoch} must not be negative")
    generator = np.random.default_rng([seed, round, epoch])
    if level == "category":
        return _by_category(pieces, ratio, generator)
    # Whole layers, stack by stack; or any matrices, and norms apart from them.
    groups: dict[Any, dict[Any, list[Piece]]] = {}
    for i, piece in enumerate(pieces):
        if level == "layer":
            groups.setdefault(piece.stack, {}).setdefault(piece.layer, []).append(piece)
        elif level == "model":
            groups.setdefault(piece.category == "norm", {})[i] = [piece]
        else:
            raise UsageError(f"level={level!r} is none of 'category', 'layer', 'model'")
    drawn: set[Piece] = set()
    for group in groups.values():
        members = list(group.values())
        order = generator.permutation(len(members))
        for i in order[: _pieces.counts(len(members), 1, ratio)[0]]:
            drawn.update(members[i])
    return drawn


def _by_category(
    pieces: Sequence[Piece], ratio: float, generator: np.random.Generator
) -> set[Piece]:
    """Choose in each layer among the matrices of a kind, as many as layers in balance ask."""
    units: dict[tuple[str, str, str], list[Piece]] = {}
    for piece in pieces:
        units.setdefault((piece.category, piece.layer, piece.unit), []).append(piece)
    # Layers of one stack whose units of a kind hold as many pieces are balanced together.
    alike: dict[tuple[str, str, str, int], list[list[Piece]]] = {}
    for (category, _, unit), members in units.items():
        key = (category, members[0].stack, unit, len(members))
        alike.setdefault(key, []).append(members)
    drawn: set[Piece] = set()
    for (*_, size), layers in alike.items():
        order = generator.permutation(len(layers))
        for i, count in zip(order, _pieces.counts(size, len(layers), ratio), strict=True):
            drawn.update(layers[i][j] for j in generator.permutation(size)[:count])
    return drawn
